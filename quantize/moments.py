"""Second moments of what enters a matrix, weighted by the router: what GPTQ, AWQ and the importance matrix feed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Raw sums over the calibration rows that E matrices with n inputs saw; s: a row's router weight (attention: 1).

    count           [E]       rows seen
    weight          [E]       sum of s^2
    second          [E, n, n] sum of s^2 x x^T, symmetric; None when only diagonals were collected
    diagonal        [E, n]    sum of s^2 x^2
    plain_diagonal  [E, n]    sum of x^2
    amax            [E]       largest |x|
    sum32, sum16    [E]       largest |sum over an aligned block of 32 or 16 inputs| (what Q8_1 keeps in float16)
    nonfinite       [E]       rows that held NaN or infinity (left out of every sum)

    All float32.
    """

    count: Tensor
    weight: Tensor
    second: Tensor | None
    diagonal: Tensor
    plain_diagonal: Tensor
    amax: Tensor
    sum32: Tensor
    sum16: Tensor
    nonfinite: Tensor

    @property
    def inputs(self) -> int:
        """n."""
        return self.diagonal.shape[-1]

    @property
    def matrices(self) -> int:
        """E."""
        return self.diagonal.shape[0]


def check_moments(moments: Moments, matrices: int, inputs: int, where: str) -> None:
    """ValueError when the moments are of another shape, hold NaN or infinity, or saw no row at all."""
    if (moments.matrices, moments.inputs) != (matrices, inputs):
        raise ValueError(
            f"{where}: moments of {moments.matrices} matrices with {moments.inputs} inputs, "
            f"expected {matrices} with {inputs} (statistics of another checkpoint?)"
        )
    for name in ("count", "weight", "second", "diagonal"):
        values = getattr(moments, name)
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{where}: {name} of the moments holds NaN or infinity, expected finite sums")
    if not bool((moments.weight > 0).any()):
        raise ValueError(f"{where}: no calibration row reached any of the {matrices} matrices")


def _pooled(sums: Tensor, weight: Tensor) -> Tensor:
    """Mean over all rows of all matrices: sums [E, ...] -> [...]."""
    return sums.sum(0) / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


def shrinkage(moments: Moments, strength: float) -> Tensor:
    """[E]: the share of the pooled mean in each matrix's shrunk moments, k / (k + rows).

    The pooled mean counts as k = strength * n rows of average router weight: a matrix that saw many times n rows keeps
    its own moments, one that saw few leans on the layer's, one that saw none takes the layer's whole.
    """
    k = _prior_weight(moments, strength)
    share = k / (moments.weight + k).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(moments.weight > 0, share, torch.ones_like(share))


def _prior_weight(moments: Moments, strength: float) -> Tensor:
    mean = moments.weight.sum() / moments.count.sum().clamp(min=1.0)
    return strength * moments.inputs * mean


def _blend(own: Tensor, weight: Tensor, pooled: Tensor, share: Tensor) -> Tensor:
    shape = (-1,) + (1,) * pooled.dim()
    mean = own / weight.clamp(min=torch.finfo(torch.float32).tiny).view(shape)
    return torch.lerp(mean, pooled.expand_as(mean), share.view(shape))


def shrunk(moments: Moments, strength: float, experts: slice | None = None) -> Tensor:
    """Mean second moments [E, n, n], blended with the pooled mean (`shrinkage`): (sum_e + k * pooled) / (weight_e + k).

    `experts` limits the result (not the pool) to some matrices. ValueError when only diagonals were collected.
    """
    if moments.second is None:
        raise ValueError("moments: only diagonals were collected, expected full second moments")
    chosen = experts if experts is not None else slice(None)
    pooled = _pooled(moments.second, moments.weight)
    return _blend(moments.second[chosen], moments.weight[chosen], pooled, shrinkage(moments, strength)[chosen])


def shrunk_diagonal(moments: Moments, strength: float, experts: slice | None = None) -> Tensor:
    """The diagonal of `shrunk` [E, n], from the diagonals alone."""
    chosen = experts if experts is not None else slice(None)
    pooled = _pooled(moments.diagonal, moments.weight)
    return _blend(moments.diagonal[chosen], moments.weight[chosen], pooled, shrinkage(moments, strength)[chosen])
