"""Exact rewritings of an expert, free at run time: powers of two between w3 and w2, and the order of its channels.

An expert computes w2 (silu(w1 x) * (w3 x)): a channel's row of w3 and column of w2 may be scaled by t and 1/t, and its
rows of w1, w3 and column of w2 may change places with another's. A power of two is exact in every format.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0
HEADROOM = 4.0  # calibration does not see the largest value that will come


def overflow_cure(largest: Tensor) -> Tensor:
    """[E] int32 powers p: w3 * 2^-p and w2 * 2^p bring w2's input within float16 with headroom; 0 where it is already.

    largest [E]: largest |value| or |block sum| of each expert's w2 input on the calibration set.
    """
    over = largest * HEADROOM / FP16_MAX
    power = torch.ceil(torch.log2(over.clamp(min=1.0)))
    # An expert that fits without headroom is left alone: nothing is changed without need.
    return torch.where(largest > FP16_MAX, power, torch.zeros_like(power)).to(torch.int32)


def scale_pair(w3: Tensor, w2: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """w3 [E, I, H] * 2^-p and w2 [E, H, I] * 2^p, exact; power [E]."""
    p = power.to(torch.int32).view(-1, 1, 1)
    return torch.ldexp(w3, -p), torch.ldexp(w2, p)


def permute_channels(w1: Tensor, w3: Tensor, w2: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The expert with its channels in another order: order [E, I], w1 and w3 [E, I, H], w2 [E, H, I]."""
    rows = order.unsqueeze(-1)
    return (
        w1.gather(1, rows.expand_as(w1)),
        w3.gather(1, rows.expand_as(w3)),
        w2.gather(2, order.unsqueeze(1).expand_as(w2)),
    )
