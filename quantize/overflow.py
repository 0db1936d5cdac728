"""Rescale experts against float16 overflow, exactly: powers of two move from up to down.

An expert computes down (silu(gate x) * (up x)). A row of up and a column of down may be scaled by t and 1 / t, and a
power of two is exact in every format. Engines that keep down's input, or a block's sum of it, in float16 overflow
where it passes 65504: in M2.7 layer 61 does.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0
AT_RISK = FP16_MAX / 2  # rescaled from here on: calibration does not see the largest value that will come
TARGET = FP16_MAX / 4  # what the largest value is brought below


def rescale_exponents(largest: Tensor) -> Tensor:
    """int32 powers p, of the shape of `largest`: up * 2^-p and down * 2^p bring down's input below TARGET.

    largest: the largest |value|, or |sum of a block|, of down's input that was seen. p is 0 where it is not AT_RISK.
    """
    power = torch.ceil(torch.log2((largest / TARGET).clamp(min=1.0)))
    return torch.where(largest > AT_RISK, power, torch.zeros_like(power)).to(torch.int32)


def scale_pair(up: Tensor, down: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """up [E, I, H] * 2^-p and down [E, H, I] * 2^p, exact; power [E]."""
    p = power.to(torch.int32).view(-1, 1, 1)
    return torch.ldexp(up, -p), torch.ldexp(down, p)
