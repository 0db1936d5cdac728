"""E2M1 levels as whole numbers, and their nibbles.

A level is kept as twice its value: -12 .. 12 of {0, 1, 2, 3, 4, 6, 8, 12}. So a code times half a block's scale is the
weight, as on the integer grids. A nibble is sign, two bits of exponent, one of mantissa (OCP MX 1.0, table 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
LEVELS = (*(-m for m in reversed(MAGNITUDES[1:])), *MAGNITUDES)
LARGEST = MAGNITUDES[-1]


def nearest(values: Tensor) -> Tensor:
    """Nearest levels, float32; of two that are equally near the one with the even code."""
    size = values.abs().clamp(max=LARGEST)
    step = torch.where(size < 4, 1.0, torch.where(size < 8, 2.0, 4.0))
    return torch.copysign((size / step).round() * step, values)


def to_nibbles(codes: Tensor) -> Tensor:
    """Levels [..., I], int8 or float32 (minus zero keeps its sign), I even -> bytes [..., I/2] uint8.

    The even input lies in the low nibble.
    """
    size = codes.abs().to(torch.uint8)
    index = torch.where(size <= 4, size, torch.where(size <= 8, size // 2 + 2, 7))
    negative = torch.signbit(codes) if codes.is_floating_point() else codes < 0
    nibble = index | (negative.to(torch.uint8) << 3)
    return nibble[..., 0::2] | (nibble[..., 1::2] << 4)


def from_nibbles(packed: Tensor, inputs: int) -> Tensor:
    """Bytes [..., I/2] -> levels [..., I] float32; minus zero keeps its sign."""
    table = torch.tensor([*map(float, MAGNITUDES), *(-float(m) for m in MAGNITUDES)], device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :inputs]
    return table[codes.int()]
