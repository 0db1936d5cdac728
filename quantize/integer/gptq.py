"""Batched GPTQ: round one column after another; the columns that follow absorb each rounding error.

The error feedback comes from H = L D L^T (L unit lower triangular), which needs no inverse: with E = W - Q the
objective tr(E H E^T) is sum_k D_k ((E L)_k)^2, so going from the last column to the first, column k is best rounded at
c_k = w_k + sum_{j>k} e_j L_jk. This equals GPTQ (Chee et al., https://arxiv.org/abs/2307.13304, theorem 6; Frantar et
al., https://arxiv.org/abs/2210.17323). Columns are processed by falling energy: groups stay contiguous, their order and
the order inside them are free, so nothing about the order reaches the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..finite import check_finite
from ..linear_algebra import cholesky, full_float32, permute_both
from .grid import groups_of, search_scales
from .panel import Grid, Panel, Solved

DAMPING = 0.03
ESCALATIONS = (1.0, 10.0, 50.0)  # a failed factorization is tried again with this many times the damping


@dataclass(frozen=True)
class Feedback:
    """Unit lower factor [E, n, n] (in processing order), its D [E, n], the order [E, n], and how it was damped [E]."""

    lower: Tensor
    scale: Tensor
    order: Tensor
    damping: Tensor
    failed: Tensor


def processing_order(diagonal: Tensor, group: int) -> Tensor:
    """[E, n]: columns by rising energy, groups kept together; the sweep goes from the last to the first."""
    energy = torch.unflatten(diagonal, -1, (-1, group))
    groups = energy.mean(-1).argsort(dim=-1, stable=True)
    inside = (
        energy.argsort(dim=-1, stable=True)
        + torch.arange(0, diagonal.shape[-1], group, device=diagonal.device)[:, None]
    )
    return inside.gather(1, groups.unsqueeze(-1).expand_as(inside)).flatten(1)


def permute_columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Columns of [E, O, n] by order [E, n]."""
    return matrix.gather(2, order.unsqueeze(1).expand_as(matrix))


def gptq_factor(second: Tensor, group: int, damping: float = DAMPING) -> Feedback:
    """Factor mean second moments [E, n, n]; a matrix that is not positive definite is tried again with more damping.

    What still fails (moments without energy, or not finite) gets the identity: round to nearest, and `failed` is set.
    """
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    usable = torch.isfinite(diagonal).all(-1) & (diagonal.mean(-1) > 0)
    order = processing_order(diagonal.nan_to_num(), group)
    lower = permute_both(second, order)
    mean = lower.diagonal(dim1=-2, dim2=-1).mean(-1)
    used = torch.full_like(mean, damping)
    lower.diagonal(dim1=-2, dim2=-1).add_((damping * mean).unsqueeze(-1))
    lower, ok = cholesky(lower)
    ok &= usable
    for times in ESCALATIONS[1:]:
        again = (usable & ~ok).nonzero().flatten()
        if not len(again):
            break
        retry = permute_both(second[again], order[again])
        retry.diagonal(dim1=-2, dim2=-1).add_((times * damping * mean[again]).unsqueeze(-1))
        lower[again], ok[again] = cholesky(retry)
        used[again] = times * damping
    failed = ~ok
    lower[failed] = torch.eye(lower.shape[-1], device=lower.device)
    scale = lower.diagonal(dim1=-2, dim2=-1).square()
    lower /= lower.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-2)
    return Feedback(lower, scale, order, used, failed)


def gptq_quantize(
    weight: Tensor,
    second: Tensor,
    grid: Grid,
    damping: float = DAMPING,
    scales: Tensor | None = None,
    keep: bool = False,
    feedback: Feedback | None = None,
) -> Solved:
    """Quantize E matrices so that the error of their outputs, measured by `second`, is small.

    weight    [E, O, I] float32
    second    [E, I, I] float32 mean second moments of the inputs
    scales    [E, O, G] to use; by default each group's are searched on the compensated weights when the sweep is there
    keep      whether to return what was rounded

    Raises ValueError for a weight with NaN or infinity and for a group size that does not divide the row.
    """
    check_finite(weight)
    group = groups_of(weight.shape[-1], grid.group_size)
    known = feedback if feedback is not None else gptq_factor(second, group, damping)
    with full_float32():
        result = gptq_sweep(weight.float(), known, grid, group, scales)
    codes, compensated = restore(result, known, keep)
    zeros = None if result.zeros is None else result.zeros.mT
    packed = grid.finish(codes, result.scales.mT.contiguous(), zeros)
    return Solved(packed, compensated, known.damping, known.failed)


@dataclass(frozen=True)
class Swept:
    """A sweep's result in processing order.

    codes [E, n, O] int8, compensated [E, n, O] float32: what was rounded; scales and zeros [E, G, O] by original group.
    """

    codes: Tensor
    compensated: Tensor
    scales: Tensor
    zeros: Tensor | None


def gptq_sweep(weight: Tensor, known: Feedback, grid: Grid, group: int, scales: Tensor | None = None) -> Swept:
    """Round columns from the last of the order to the first, each after the errors of those before it are fed in.

    weight [E, O, n] float32. Panels of columns take the errors of all later columns by one matrix product; inside a
    panel the grid feeds them on (on CUDA in fused kernels).
    """
    experts, outputs, n = weight.shape
    columns = permute_columns(weight, known.order).mT.contiguous()
    errors, inside = torch.empty_like(columns), columns.clone()
    codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    groups = known.order[:, ::group] // group  # [E, G]: the original group at each place of the order
    found = scales.mT.contiguous() if scales is not None else weight.new_empty(experts, n // group, outputs)
    zeros = None if grid.symmetric else torch.zeros_like(found)
    first = grid.searches_first(group)
    if scales is None and first:
        _search_rows(weight, known, grid, found, zeros)
    for start, stop in blocks(n, grid.panel):
        part = inside[:, start:stop]
        if stop < n:
            lower = known.lower[:, stop:, start:stop]
            torch.baddbmm(part, lower.mT, errors[:, stop:], out=part)
        panel = Panel(
            part,
            columns[:, start:stop],
            known.lower[:, start:stop, start:stop],
            known.scale[:, start:stop],
            groups[:, start // group : -(-stop // group)],
            codes[:, start:stop],
            errors[:, start:stop],
        )
        grid.round_panel(panel, found, zeros, scales is None and not first)
    return Swept(codes, inside, found, zeros)


def blocks(n: int, size: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks from the last to the first; the ragged one comes last."""
    stops = range(n, 0, -size)
    return [(max(0, stop - size), stop) for stop in stops]


def _search_rows(weight: Tensor, known: Feedback, grid: Grid, found: Tensor, zeros: Tensor | None) -> None:
    """Scales of whole rows (or wide groups) before the sweep: on the original weights, columns weighed by D."""
    importance = torch.empty_like(known.scale).scatter_(1, known.order, known.scale)
    scale, zero = search_scales(weight, importance, grid.bits, weight.shape[-1] // found.shape[1], grid.symmetric)
    found.copy_(scale.mT)
    if zeros is not None and zero is not None:
        zeros.copy_(zero.mT)


def restore(result: Swept, known: Feedback, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Codes and compensated weights back in the order of the file: [E, O, n]."""
    inverse = known.order.argsort(dim=-1)
    codes = permute_columns(result.codes.mT, inverse)
    return codes, permute_columns(result.compensated.mT, inverse) if keep else None
