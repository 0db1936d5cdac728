"""Bit fields of ggml blocks: fields to integers, integers to bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """P blocks taken apart. `codes` [P, block] uint8 are indices into the type's ascending levels.

    d, dmin [P] float16 (d uint8 for MXFP4); steps, minimums [P, block/sub] int16; None where the type has none.
    """

    codes: Tensor
    d: Tensor
    dmin: Tensor | None = None
    steps: Tensor | None = None
    minimums: Tensor | None = None


def need(part: Tensor | None) -> Tensor:
    """The part, which the type must have."""
    assert part is not None
    return part


def half_bytes(value: Tensor) -> Tensor:
    """[P] float16 -> [P, 2] uint8, little endian."""
    return value.to(torch.float16).contiguous().view(torch.uint8).view(-1, 2)


def bytes_half(pair: Tensor) -> Tensor:
    """[P, 2] uint8 -> [P] float16."""
    return pair.contiguous().view(torch.float16).view(-1)


def join_bits(fields: Tensor, bits: int) -> Tensor:
    """[..., k, m] uint8 of `bits` bits -> [..., m]: field j at bit j * bits."""
    out = fields[..., 0, :].clone()
    for j in range(1, fields.shape[-2]):
        out |= fields[..., j, :] << (j * bits)
    return out


def split(packed: Tensor, bits: int, count: int) -> Tensor:
    """[..., m] uint8 -> [..., count, m]: the inverse of `join_bits`."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (j * bits)) & mask for j in range(count)], -2)


def nibbles(codes: Tensor) -> Tensor:
    """[P, b, 32] below 16 -> [P, b * 16]: of 32 columns the first half is in low nibbles, the second in high ones."""
    eights = codes.contiguous().view(torch.int64)  # eight codes at a time
    return (eights[..., 2:] << 4 | eights[..., :2]).flatten(1).view(torch.uint8)


def from_nibbles(packed: Tensor) -> Tensor:
    """[P, b * 16] -> [P, b * 32], the inverse of `nibbles`."""
    return split(torch.unflatten(packed, -1, (-1, 16)), 4, 2).flatten(1)
