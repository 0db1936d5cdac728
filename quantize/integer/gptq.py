"""Batched GPTQ: round one column after another; the columns that follow absorb each rounding error.

The error feedback comes from H = L D L^T (L unit lower triangular), which needs no inverse: with E = W - Q the
objective tr(E H E^T) is sum_k D_k ((E L)_k)^2, so going from the last column to the first, column k is best rounded at
c_k = w_k + sum_{j>k} e_j L_jk. This equals GPTQ (Chee et al., https://arxiv.org/abs/2307.13304, theorem 6; Frantar et
al., https://arxiv.org/abs/2210.17323). Columns are processed by falling energy: groups stay contiguous, their order and
the order inside them are free, so nothing about the order reaches the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..linear_algebra import cholesky, full_float32, permute_both
from ..refit import refit_scales
from .grid import IntWeight, code_range, groups_of, round_to_codes, search_scales, search_weights
from .rtn import rtn_int

DAMPING = 0.03
BLOCK = 128  # columns that one matrix product brings up to date
ESCALATIONS = (1.0, 10.0, 50.0)  # a failed factorization is tried again with this many times the damping


@dataclass(frozen=True)
class Panel:
    """Neighbouring columns of E matrices in processing order, all [E, P, O] with outputs contiguous.

    part        with the errors of the columns behind the panel fed in; becomes what was rounded
    columns     as they came
    triangle    [E, P, P] of the feedback's lower factor; None: no errors are fed back
    importance  [E, P] that weighs the squared errors of a column
    place       [E, P / group]: the original group at each place
    codes       int8, filled; errors: filled (None without a triangle)
    """

    part: Tensor
    columns: Tensor
    triangle: Tensor | None
    importance: Tensor
    place: Tensor
    codes: Tensor
    errors: Tensor | None


class Grid(Protocol):
    """What codes and scales may be. Error feedback and the calibrated folders work on any grid.

    bits        of a code
    group_size  weights that share a scale; -1: a row
    symmetric   neither zero points nor biases
    """

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        ...

    @property
    def shared(self) -> bool:
        """Whether matrices that an engine fuses (gate and up; q, k and v) must be solved together."""
        ...

    @property
    def panel(self) -> int:
        """Columns that one matrix product brings up to date, at most."""
        ...

    def searches_first(self, group: int) -> bool:
        """Whether scales of groups this wide are searched before the sweep."""
        ...

    def round_panel(self, panel: Panel, found: Tensor, zeros: Tensor | None, search: bool) -> None:
        """Round a panel from its last column to its first; scales (and zeros) [E, G, O] by original group.

        They are filled where `search`, else used.
        """
        ...

    def finish(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> IntWeight:
        """The matrices [E, O, I] as they can be stored."""
        ...

    def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
        """Nearest codes of weight [E, O, I] under searched scales; importance [E, I] weighs a column's error."""
        ...

    def refit(self, weight: Tensor, solved: Solved, second: Tensor) -> Solved:
        """Improve what error feedback found of weight [E, O, I]; second [E, I, I] mean second moments."""
        ...


@dataclass(frozen=True)
class GptqGrid:
    """Integers: bits, weights that share a scale (-1: a row), zero points or not."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    shared: bool = False

    @property
    def panel(self) -> int:
        """A group, at most BLOCK columns."""
        return BLOCK if self.group_size == -1 else min(self.group_size, BLOCK)

    def searches_first(self, group: int) -> bool:
        """Whether a group is wider than a panel."""
        return group > BLOCK

    def round_panel(self, panel: Panel, found: Tensor, zeros: Tensor | None, search: bool) -> None:
        """See `Grid`."""
        place = panel.place[:, 0]
        if search:
            scale, zero = _search_group(panel.part, panel.importance, self)
            put(found, place, scale)
            if zeros is not None and zero is not None:
                put(zeros, place, zero)
        grids = (take(found, place), None if zeros is None else take(zeros, place))
        assert panel.triangle is not None
        assert panel.errors is not None
        sweep_block(panel.part, panel.columns, panel.triangle, grids, self.bits, panel.codes, panel.errors)

    def finish(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> IntWeight:
        """See `Grid`."""
        return IntWeight(codes, scales, None if zeros is None else zeros.to(torch.int8), self.bits)

    def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
        """See `Grid`."""
        size = groups_of(weight.shape[-1], self.group_size)
        if weight.is_cuda and self.symmetric and importance is not None and size <= BLOCK:
            return nearest_fused(weight, importance, size, self.bits)
        return rtn_int(weight, self.bits, self.group_size, self.symmetric, importance=importance)

    def refit(self, weight: Tensor, solved: Solved, second: Tensor) -> Solved:
        """The codes under scales that cost the outputs least; unchanged where learning will find both."""
        if solved.compensated is not None:
            return solved
        return replace(solved, weight=refit_scales(weight, solved.weight, second))


@dataclass(frozen=True)
class Solved:
    """Quantized matrices and how they came about.

    compensated [E, O, I] float32: what was rounded (None unless asked); damping [E]: share of the mean diagonal that
    was added; rounded [E] bool: no factorization was possible and the matrix was rounded to nearest; plain
    [E, matrices] bool: so were these, since held-out rows say that feedback errs more (None: not asked).
    """

    weight: IntWeight
    compensated: Tensor | None
    damping: Tensor
    rounded: Tensor
    plain: Tensor | None = None


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
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"weight {tuple(weight.shape)} holds NaN or infinity, expected finite values")
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


def sweep_block(
    part: Tensor,
    columns: Tensor,
    triangle: Tensor,
    grids: tuple[Tensor, Tensor | None],
    bits: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Columns of one block [E, B, O], one by one: part becomes what was rounded, codes and errors are filled.

    grids: scales [E, O], and the codes, whole or not, whose value is zero.
    """
    sweep = _fused().sweep_block if part.is_cuda else sweep_block_torch
    sweep(part, columns, triangle, grids, bits, codes, errors)


def sweep_block_torch(
    part: Tensor,
    columns: Tensor,
    triangle: Tensor,
    grids: tuple[Tensor, Tensor | None],
    bits: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """`sweep_block` as its definition."""
    low, high = code_range(bits)
    scale, zero = grids
    shift = torch.zeros_like(scale) if zero is None else zero
    for k in range(part.shape[1] - 1, -1, -1):
        code = (part[:, k] / scale + shift).round_().clamp_(low, high)
        codes[:, k] = code
        error = columns[:, k] - (code - shift) * scale
        errors[:, k] = error
        if k:
            part[:, :k].addcmul_(triangle[:, k, :k].unsqueeze(-1), error.unsqueeze(1))


def _search_group(part: Tensor, importance: Tensor, grid: GptqGrid) -> tuple[Tensor, Tensor | None]:
    """Scales [E, O] (and zeros, as float) of the compensated weights [E, B, O] of one group, columns weighed by D."""
    if part.is_cuda and grid.symmetric:
        return _fused().search_group(part, search_weights(importance), grid.bits), None
    scale, zero = search_scales(part.mT, importance, grid.bits, -1, grid.symmetric)
    return scale.squeeze(-1), None if zero is None else zero.squeeze(-1).float()


def nearest_fused(weight: Tensor, importance: Tensor, size: int, bits: int) -> IntWeight:
    """As `rtn_int` for groups that a CUDA kernel holds: one launch for a group of all matrices [E, O, I]."""
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"weight {tuple(weight.shape)} holds NaN or infinity, expected finite values")
    columns, weighing = (
        weight.float().mT.contiguous(),
        search_weights(torch.unflatten(importance.float(), -1, (-1, size))),
    )
    groups = range(weight.shape[-1] // size)
    parts = [columns[:, group * size : (group + 1) * size] for group in groups]
    found = [_fused().search_group(parts[group], weighing[:, group], bits) for group in groups]
    return round_to_codes(weight, torch.stack(found, -1), None, bits)


def _fused() -> ModuleType:
    """The CUDA kernels, imported where they are first needed: triton is not there on every machine."""
    from . import gptq_triton

    return gptq_triton


def _search_rows(weight: Tensor, known: Feedback, grid: Grid, found: Tensor, zeros: Tensor | None) -> None:
    """Scales of whole rows (or wide groups) before the sweep: on the original weights, columns weighed by D."""
    importance = torch.empty_like(known.scale).scatter_(1, known.order, known.scale)
    scale, zero = search_scales(weight, importance, grid.bits, weight.shape[-1] // found.shape[1], grid.symmetric)
    found.copy_(scale.mT)
    if zeros is not None and zero is not None:
        zeros.copy_(zero.mT)


def take(table: Tensor, place: Tensor) -> Tensor:
    """Row place[e] of each expert's table [E, G, O] -> [E, O]."""
    return table[torch.arange(len(place), device=place.device), place]


def put(table: Tensor, place: Tensor, values: Tensor) -> None:
    """Row place[e] of each expert's table [E, G, O] becomes values [E, O]."""
    table[torch.arange(len(place), device=place.device), place] = values


def restore(result: Swept, known: Feedback, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Codes and compensated weights back in the order of the file: [E, O, n]."""
    inverse = known.order.argsort(dim=-1)
    codes = permute_columns(result.codes.mT, inverse)
    return codes, permute_columns(result.compensated.mT, inverse) if keep else None
