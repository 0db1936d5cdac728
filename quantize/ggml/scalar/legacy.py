"""Bytes of the types with blocks of 32 and one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

Source: block_q4_0 ... block_q8_0 in ggml-common.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Blocks, bytes_half, from_nibbles, half_bytes, need, nibbles

_ONES, _GATHER = 0x0101010101010101, 0x0102040810204080


def pack_q8_0(blocks: Blocks) -> Tensor:
    """d, then 32 signed bytes: a code plus 128, modulo 256."""
    return torch.cat([half_bytes(blocks.d), blocks.codes ^ 128], 1)


def unpack_q8_0(data: Tensor) -> Blocks:
    """The inverse of `pack_q8_0`."""
    return Blocks(data[:, 2:] ^ 128, bytes_half(data[:, :2]))


def pack_q4_0(blocks: Blocks) -> Tensor:
    """d, then 16 bytes of nibbles."""
    return torch.cat([half_bytes(blocks.d), nibbles(blocks.codes.view(-1, 1, 32))], 1)


def unpack_q4_0(data: Tensor) -> Blocks:
    """The inverse of `pack_q4_0`."""
    return Blocks(from_nibbles(data[:, 2:]), bytes_half(data[:, :2]))


def pack_q4_1(blocks: Blocks) -> Tensor:
    """d, m = -dmin, then 16 bytes of nibbles."""
    return torch.cat([_d_and_m(blocks), nibbles(blocks.codes.view(-1, 1, 32))], 1)


def unpack_q4_1(data: Tensor) -> Blocks:
    """The inverse of `pack_q4_1`."""
    return Blocks(from_nibbles(data[:, 4:]), bytes_half(data[:, :2]), -bytes_half(data[:, 2:4]))


def pack_q5_0(blocks: Blocks) -> Tensor:
    """d, 32 fifth bits, then 16 bytes of nibbles."""
    return torch.cat([half_bytes(blocks.d), *_five_bits(blocks.codes)], 1)


def unpack_q5_0(data: Tensor) -> Blocks:
    """The inverse of `pack_q5_0`."""
    return Blocks(_from_five_bits(data[:, 2:]), bytes_half(data[:, :2]))


def pack_q5_1(blocks: Blocks) -> Tensor:
    """d, m = -dmin, 32 fifth bits, then 16 bytes of nibbles."""
    return torch.cat([_d_and_m(blocks), *_five_bits(blocks.codes)], 1)


def unpack_q5_1(data: Tensor) -> Blocks:
    """The inverse of `pack_q5_1`."""
    return Blocks(_from_five_bits(data[:, 4:]), bytes_half(data[:, :2]), -bytes_half(data[:, 2:4]))


def _d_and_m(blocks: Blocks) -> Tensor:
    return torch.cat([half_bytes(blocks.d), half_bytes(-need(blocks.dmin))], 1)


def _five_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    eights = codes.contiguous().view(torch.int64) >> 4 & _ONES
    fifth = (eights * _GATHER >> 56).to(torch.uint8)  # bit 0 of byte i to bit i of the highest byte
    return fifth, nibbles((codes & 15).view(-1, 1, 32))


def _from_five_bits(data: Tensor) -> Tensor:
    fifth = (data[:, :4, None] >> torch.arange(8, device=data.device, dtype=torch.uint8)) & 1
    return from_nibbles(data[:, 4:]) | (fifth.flatten(1) << 4)
