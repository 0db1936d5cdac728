"""NVFP4 and MXFP4 as grids for rounding and error feedback: scales are searched over what the format can store.

A block's scale has few significant bits: four in E4M3 (NVFP4, 16 inputs), one in E8M0 (MXFP4, 32 inputs). So all its
neighbours are tried, and that with the least squared error, weighed by the inputs' moments, is taken. In a sweep of
error feedback that happens when the block is reached, on the weights that carry the errors of the blocks before.

NVFP4 multiplies E4M3 scales by a float32 for the whole matrix. Here it is a power of two: nothing is lost (E4M3 is a
float, too), every dequantized weight is exact in bfloat16 and in float16's significand, and no rounding of the factor
differs between engines. It is chosen so that the largest block scale lies in (224, 448]. Block scales below 2^-6, the
subnormals of E4M3, are raised to it: Marlin (vLLM on A100 and H100) writes those as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..finite import check_finite
from ..integer.descent import descend
from ..integer.grid import IntWeight, groups_of, search_weights
from ..integer.panel import Panel, Solved
from ..linear_algebra import full_float32
from .levels import LEVELS, nearest

LARGEST_SCALE, LEAST_SCALE = 448.0, 2.0**-6  # of E4M3; the least that no kernel loses
TINY = 2.0**-100  # scale of a block of zeros, before it gets the matrix's least
PANEL = 128


@dataclass(frozen=True)
class Fp4Grid:
    """E2M1 under scales of `group_size` inputs with `mantissa` stored bits.

    below, above: scales tried under and above the one that reaches the largest weight, in steps of the last bit
    shared: whether the scales of a matrix have a common unit (IntWeight.unit)
    passes: of the descent after error feedback
    """

    group_size: int
    mantissa: int
    below: int
    above: int
    shared: bool
    bits: int = 4
    symmetric: bool = True
    passes: int = 1

    @property
    def panel(self) -> int:
        """Columns that one matrix product brings up to date: whole groups."""
        return PANEL

    def searches_first(self, group: int) -> bool:
        """Never: groups are narrow, and searched when the sweep reaches them."""
        del group
        return False

    def round_panel(self, panel: Panel, found: Tensor, zeros: Tensor | None, search: bool) -> None:
        """See `panel.Grid`."""
        del zeros
        experts, columns, outputs = panel.part.shape
        groups = columns // self.group_size
        scales = panel.part.new_empty(experts, groups, outputs)
        everyone = torch.arange(experts, device=scales.device).unsqueeze(1)
        if not search:
            scales.copy_(found[everyone, panel.place])
        round_columns(self, panel, scales, search)
        found[everyone, panel.place] = scales

    def finish(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> IntWeight:
        """Codes [E, O, I] under half scales [E, O, G] as they can be stored: with a unit, none too small for it."""
        del zeros
        scales = torch.where((torch.unflatten(codes, -1, (scales.shape[-1], -1)) == 0).all(-1), TINY, scales)
        if not self.shared:
            return IntWeight(codes, scales, None, self.bits, LEVELS)
        top = 2 * scales.amax((-2, -1), keepdim=True)  # half scales are kept
        mantissa, exponent = torch.frexp(top / LARGEST_SCALE)
        unit = torch.ldexp(torch.ones_like(top), exponent - (mantissa <= 0.5).int())
        least = unit * (LEAST_SCALE / 2)
        low = scales < least
        if bool(low.any()):
            grouped = torch.unflatten(codes, -1, (scales.shape[-1], -1))
            again = nearest(grouped * (scales / least).unsqueeze(-1)).to(codes.dtype)
            codes = torch.where(low.unsqueeze(-1), again, grouped).flatten(-2)
            scales = torch.where(low, least, scales)
        return IntWeight(codes, scales, None, self.bits, LEVELS, unit.expand(*scales.shape[:-1], 1).contiguous())

    def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
        """Nearest codes of weight [E, O, I] under the best scales; importance [E, I] weighs a column's error."""
        check_finite(weight)
        experts, outputs, n = weight.shape
        size = groups_of(n, self.group_size)
        columns = weight.float().mT.contiguous()
        codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
        scales = columns.new_empty(experts, n // size, outputs)
        spread = columns.new_ones(experts, n) if importance is None else importance.float()
        step = PANEL * max(1, size // PANEL)
        for start in range(0, n, step):
            part = slice(start, min(n, start + step))
            place = torch.empty(0, device=weight.device)  # nothing is permuted
            panel = Panel(columns[:, part], columns[:, part], None, spread[:, part], place, codes[:, part], None)
            round_columns(self, panel, scales[:, start // size : part.stop // size], True)
        return self.finish(codes.mT.contiguous(), scales.mT.contiguous(), None)

    def refit(self, weight: Tensor, solved: Solved, second: Tensor) -> Solved:
        """Codes and scales again, panel by panel: a least-squares step of the scales alone would be finer than they."""
        return descend(weight, solved, second, self, self.passes)


NVFP4 = Fp4Grid(16, 3, 3, 7, True, passes=1)
MXFP4 = Fp4Grid(32, 0, 0, 1, False, passes=2)


def round_columns(grid: Fp4Grid, panel: Panel, scales: Tensor, search: bool) -> None:
    """Round a panel's columns from the last to the first. scales [E, P/group, O]: filled, or with `search` False used.

    With a triangle each column takes the errors of those behind it (panel.part becomes what was rounded); without one
    the columns are rounded as they are.
    """
    importance = weighing(panel.importance, grid.group_size)
    if panel.part.is_cuda:
        with full_float32():
            _fused().round_columns(grid, panel, importance, scales, search)
        return
    from .panel_cpu import round_columns as on_cpu  # numba takes seconds to import

    on_cpu(grid, panel, importance, scales, search)


def weighing(importance: Tensor, group: int) -> Tensor:
    """[E, P]: weights of the squared errors, as `search_weights` of each group."""
    return search_weights(torch.unflatten(importance, -1, (-1, group))).flatten(-2).contiguous()


def _fused() -> ModuleType:
    from . import panel_triton

    return panel_triton
