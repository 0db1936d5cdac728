"""The integer grid under error feedback: its scales, and the columns of one panel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..finite import check_finite
from ..refit import refit_scales
from .grid import IntWeight, code_range, groups_of, round_to_codes, search_scales, search_weights
from .panel import Panel, Solved, put, take
from .rtn import rtn_int

BLOCK = 128  # columns that one matrix product brings up to date


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
        sweep_block(panel, grids, self.bits)

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


def sweep_block(panel: Panel, grids: tuple[Tensor, Tensor | None], bits: int) -> None:
    """Columns of one group, one by one: the panel's part becomes what was rounded, codes and errors are filled.

    grids: scales [E, O], and the codes, whole or not, whose value is zero.
    """
    sweep = _fused().sweep_block if panel.part.is_cuda else sweep_block_torch
    sweep(panel, grids, bits)


def sweep_block_torch(panel: Panel, grids: tuple[Tensor, Tensor | None], bits: int) -> None:
    """`sweep_block` as its definition."""
    part, triangle, errors = panel.part, panel.triangle, panel.errors
    assert triangle is not None
    assert errors is not None
    low, high = code_range(bits)
    scale, zero = grids
    shift = torch.zeros_like(scale) if zero is None else zero
    for k in range(part.shape[1] - 1, -1, -1):
        code = (part[:, k] / scale + shift).round_().clamp_(low, high)
        panel.codes[:, k] = code
        error = panel.columns[:, k] - (code - shift) * scale
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
    check_finite(weight)
    columns = weight.float().mT.contiguous()
    weighing = search_weights(torch.unflatten(importance.float(), -1, (-1, size)))
    groups = range(weight.shape[-1] // size)
    parts = [columns[:, group * size : (group + 1) * size] for group in groups]
    found = [_fused().search_group(parts[group], weighing[:, group], bits) for group in groups]
    return round_to_codes(weight, torch.stack(found, -1), None, bits)


def _fused() -> ModuleType:
    """The CUDA kernels, imported where they are first needed: triton is not there on every machine."""
    from . import gptq_triton

    return gptq_triton
