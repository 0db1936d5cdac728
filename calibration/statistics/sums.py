"""Running sums of moments, and the reductions over rows and columns that feed them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quantize.moments import Moments


class Sums:
    """Running sums of `Moments` for E matrices with n inputs; second moments only of the matrices in `kept`."""

    def __init__(self, matrices: int, inputs: int, full: bool, kept: range, device: torch.device | str) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self.count, self.weight, self.nonfinite = zeros(matrices), zeros(matrices), zeros(matrices)
        self.amax, self.sum32, self.sum16 = zeros(matrices), zeros(matrices), zeros(matrices)
        self.plain, self.diagonal = zeros(matrices, inputs), zeros(matrices, inputs)
        self.kept = kept
        self.second = zeros(len(kept), inputs, inputs) if full else None

    def extremes(self, values: tuple[Tensor, Tensor, Tensor]) -> None:
        """Raise the maxima to `values`, three tensors [E]."""
        for have, new in zip((self.amax, self.sum32, self.sum16), values, strict=True):
            torch.maximum(have, new, out=have)

    def moments(self, held: Tensor | None = None) -> Moments:
        """The sums as they stand, with held-out rows; the diagonal is read off full moments of all matrices."""
        diagonal = self.diagonal
        if self.second is not None and len(self.kept) == len(self.count):
            diagonal = self.second.diagonal(dim1=1, dim2=2).clone()
        return Moments(
            count=self.count,
            weight=self.weight,
            second=self.second,
            diagonal=diagonal,
            plain_diagonal=self.plain,
            amax=self.amax,
            sum32=self.sum32,
            sum16=self.sum16,
            nonfinite=self.nonfinite,
            held=held,
        )


def add_gram(total: Tensor, x: Tensor) -> None:
    """total [n, n] float32 += x^T x with float32 accumulation; x [R, n] float32 or bfloat16."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        torch.addmm(total, x.T, x, out_dtype=torch.float32, out=total)
    else:
        x = x.float()
        total.addmm_(x.T, x)


def scaled_rows(x: Tensor, row_weight: Tensor) -> Tensor:
    """Rows x [R, n] times share [R] float32, rounded once to x's dtype."""
    return torch.mul(x, row_weight[:, None], out=torch.empty_like(x))


def row_extremes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, n] -> [R] each: largest |x|, largest |sum| over aligned blocks of 32 and of 16 (a ragged last one too)."""
    ragged = -x.shape[1] % 32
    blocks = F.pad(x, (0, ragged)) if ragged else x
    sixteen = blocks.unflatten(1, (-1, 16)).sum(-1, dtype=torch.float32)
    thirtytwo = sixteen.unflatten(1, (-1, 2)).sum(-1)
    return abs_max(x, 1), thirtytwo.abs().amax(1), sixteen.abs().amax(1)


def column_squares(x: Tensor) -> Tensor:
    """x [R, n] -> [n] sum of x^2 in float32."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
    return x.float().square().sum(0)  # a norm over columns takes five times as long on CPU


def abs_max(x: Tensor, dim: int) -> Tensor:
    """Largest |x| over one axis of x [R, n], float32."""
    if x.is_cuda:
        return torch.linalg.vector_norm(x, torch.inf, dim=dim, dtype=torch.float32)
    return x.abs().amax(dim).float()


def expanded(moments: Moments, matrices: int) -> Moments:
    """The moments of one matrix as those of `matrices` equal ones, without copying."""

    def repeat(value: Tensor) -> Tensor:
        return value.expand(matrices, *value.shape[1:])

    return Moments(
        count=repeat(moments.count),
        weight=repeat(moments.weight),
        second=None if moments.second is None else repeat(moments.second),
        diagonal=repeat(moments.diagonal),
        plain_diagonal=repeat(moments.plain_diagonal),
        amax=repeat(moments.amax),
        sum32=repeat(moments.sum32),
        sum16=repeat(moments.sum16),
        nonfinite=repeat(moments.nonfinite),
    )


def spread(values: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """values [N, K] (or [N, 1]) of the chosen experts [N, K] as [N, E], zero elsewhere."""
    out = torch.zeros(chosen.shape[0], experts, device=values.device)
    return out.scatter_(1, chosen, values.expand(chosen.shape).float())


def owners(offsets: list[int], token: Tensor) -> Tensor:
    """The expert of each routed row [R]: expert e has the rows offsets[e] .. offsets[e + 1] of `token` [R]."""
    counts = torch.tensor(offsets, device=token.device).diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=token.device), counts, output_size=len(token))
