"""Repair that costs no bytes: a matrix that stays unquantized, refitted to what the quantized model gives it."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.01


def refit_linear(weight: Tensor, reference: Tensor, found: Tensor, ridge: float = RIDGE) -> Tensor:
    """The matrix whose outputs on `found` come closest to those of `weight` on `reference`, pulled towards `weight`.

    weight [O, n]; reference, found [N, n] the same tokens' inputs before and after quantization; float32.
    Least squares: (F^T F + r I) V^T = F^T R W^T + r W^T with r a share of the mean square.
    """
    gram = found.T @ found
    pull = ridge * gram.diagonal().mean()
    gram.diagonal().add_(pull)
    wanted = found.T @ (reference @ weight.T) + pull * weight.T
    return torch.linalg.solve(gram, wanted).T.contiguous()


def agreement(chosen: Tensor, wanted: Tensor) -> float:
    """Share of the wanted experts [N, K] that are among the chosen ones [N, K]."""
    return float((chosen.unsqueeze(-1) == wanted.unsqueeze(-2)).any(-1).float().mean())
