"""Bytes of the 4-bit types with uneven levels: IQ4_NL, IQ4_XS and MXFP4.

Source: block_iq4_nl, block_iq4_xs, block_mxfp4 and kvalues_* in ggml-common.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Blocks, bytes_half, from_nibbles, half_bytes, join_bits, need, nibbles, split

# MXFP4 stores sign and magnitude: the code (of ascending levels, 0 being 7) of each nibble; nibble 8 is -0.
_MXFP4_LEVEL = (7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0)


def pack_iq4_nl(blocks: Blocks) -> Tensor:
    """d, then 16 bytes of nibbles."""
    return torch.cat([half_bytes(blocks.d), nibbles(blocks.codes.view(-1, 1, 32))], 1)


def unpack_iq4_nl(data: Tensor) -> Blocks:
    """The inverse of `pack_iq4_nl`."""
    return Blocks(from_nibbles(data[:, 2:]), bytes_half(data[:, :2]))


def pack_iq4_xs(blocks: Blocks) -> Tensor:
    """d, 2 bytes of the steps' high bits, 4 bytes of their low nibbles, 128 bytes of nibbles."""
    steps = (need(blocks.steps) + 32).to(torch.uint8)
    high = join_bits((steps >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    low = join_bits((steps & 15).view(-1, 4, 2).transpose(1, 2), 4)
    return torch.cat([half_bytes(blocks.d), high, low, nibbles(blocks.codes.view(-1, 8, 32))], 1)


def unpack_iq4_xs(data: Tensor) -> Blocks:
    """The inverse of `pack_iq4_xs`."""
    high = split(data[:, 2:4], 2, 4).transpose(1, 2).flatten(1)
    low = split(data[:, 4:8], 4, 2).transpose(1, 2).flatten(1)
    steps = (low | (high << 4)).to(torch.int16) - 32
    return Blocks(from_nibbles(data[:, 8:]), bytes_half(data[:, :2]), steps=steps)


def pack_mxfp4(blocks: Blocks) -> Tensor:
    """The exponent byte, then 16 bytes of nibbles."""
    level = blocks.codes.view(torch.int8) - 7
    stored = level.abs() | (level >> 4 & 8)
    return torch.cat([blocks.d.view(-1, 1), nibbles(stored.view(torch.uint8).view(-1, 1, 32))], 1)


def unpack_mxfp4(data: Tensor) -> Blocks:
    """The inverse of `pack_mxfp4`; -0 comes back as 0."""
    table = torch.tensor(_MXFP4_LEVEL, dtype=torch.uint8, device=data.device)
    return Blocks(table[from_nibbles(data[:, 1:]).int()], data[:, 0])
