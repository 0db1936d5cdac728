"""Second moments of a matrix's input, weighted by the router: what GPTQ, AWQ and the importance matrix use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mmquant.errors import InputError

TINY = torch.finfo(torch.float32).tiny


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
    held            [E, R, n] s x of rows that are in no sum, zero where there are too few; None when none were kept

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
    held: Tensor | None = None

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
        raise InputError(
            f"{where}: moments of {moments.matrices} matrices with {moments.inputs} inputs, "
            f"expected {matrices} with {inputs} (statistics of another checkpoint?)"
        )
    for name in ("count", "weight", "second", "diagonal"):
        values = getattr(moments, name)
        if values is not None and not bool(torch.isfinite(values).all()):
            raise InputError(f"{where}: {name} of the moments holds NaN or infinity, expected finite sums")
    if not bool((moments.weight > 0).any()):
        raise InputError(f"{where}: no calibration row reached any of the {matrices} matrices")


def shrinkage(moments: Moments, strength: float) -> Tensor:
    """[E]: the share of the pooled moments in each matrix's shrunk ones, k / (k + rows).

    The pool counts as k = strength * n rows of average router weight: a matrix that saw many times n rows keeps its own
    moments, one that saw few leans on the layer's, one that saw none takes the layer's whole.
    """
    mean = moments.weight.sum() / moments.count.sum().clamp(min=1.0)
    k = strength * moments.inputs * mean
    share = k / (moments.weight + k).clamp(min=TINY)
    return torch.where(moments.weight > 0, share, torch.ones_like(share))


def pooled(moments: Moments, experts: slice | None = None) -> Tensor | None:
    """The pool of `shrunk` [n, n], for callers that take experts chunk by chunk; None when only diagonals were kept.

    experts: what these add to it alone.
    """
    if moments.second is None:
        return None
    chosen = experts if experts is not None else slice(None)
    return _pool(moments, moments.second[chosen], chosen)


def shrunk(moments: Moments, strength: float, experts: slice | None = None, pool: Tensor | None = None) -> Tensor:
    """Mean second moments [E, n, n], each blended with the pool by `shrinkage`: (sum_e + k * pool_e) / (weight_e + k).

    The pool is the mean of all matrices' moments at unit energy (trace n), weighed by what they saw, and pool_e is the
    pool at the energy of matrix e: an expert whose activations are a thousand times larger (they exist) does not drown
    the others. `experts` limits the result, not the pool. ValueError when only diagonals were collected.
    """
    if moments.second is None:
        raise InputError("moments: only diagonals were collected, expected full second moments")
    pool = pool if pool is not None else _pool(moments, moments.second)
    return _blend(moments.second, pool, moments, strength, experts if experts is not None else slice(None))


def shrunk_diagonal(moments: Moments, strength: float, experts: slice | None = None) -> Tensor:
    """The diagonal of `shrunk` [E, n], from the diagonals alone."""
    pool = _pool(moments, moments.diagonal)
    return _blend(moments.diagonal, pool, moments, strength, experts if experts is not None else slice(None))


def _energy(moments: Moments) -> Tensor:
    """[E] mean square of an input."""
    return moments.diagonal.mean(-1) / moments.weight.clamp(min=TINY)


def _pool(moments: Moments, sums: Tensor, experts: slice | None = None) -> Tensor:
    weight, energy = moments.weight, _energy(moments)
    unit = torch.where(energy > 0, 1 / energy.clamp(min=TINY), torch.zeros_like(energy)) / weight.sum().clamp(min=TINY)
    return cast("Tensor", torch.tensordot(unit if experts is None else unit[experts], sums, dims=1))


def _blend(sums: Tensor, pool: Tensor, moments: Moments, strength: float, experts: slice) -> Tensor:
    weight, energy = moments.weight, _energy(moments)
    # A matrix that saw nothing gets the pool at the layer's median energy.
    seen = energy[weight > 0]
    middle = seen.median() if len(seen) else torch.ones_like(weight.sum())
    own = torch.where(weight > 0, energy, middle)[experts]
    shape = (-1,) + (1,) * pool.dim()
    share = shrinkage(moments, strength)[experts].view(shape)
    blended = sums[experts] * ((1 - share) / weight[experts].clamp(min=TINY).view(shape))
    return blended.addcmul_((share * own.view(shape)), pool.unsqueeze(0))
