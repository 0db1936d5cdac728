"""Block coordinate descent after error feedback: each panel of columns is rounded again, all others held.

With e = W - Q the objective tr(e H e^T) is, in the columns P of a panel, quadratic: its minimum over real e_P is at
-c H_PP^-1, c what the other columns' errors weigh on the panel. So Q_P is rounded anew at W_P + c H_PP^-1, with scales
searched and errors fed back inside the panel under H_PP. A row keeps its panel where that is no better: the objective
never rises. One sweep of GPTQ decides each column before it knows the errors of those before it; here all are known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_algebra import full_float32, solve
from .gptq import DAMPING, Grid, gptq_factor, gptq_sweep, restore
from .grid import IntWeight, dequantize, groups_of

PANEL, PASSES = 64, 2


def descend(weight: Tensor, found: IntWeight, second: Tensor, grid: Grid, passes: int = PASSES) -> IntWeight:
    """The same matrices with a smaller error of their outputs, measured by `second` damped as for GPTQ.

    weight [E, O, I] float32; found: what was rounded, without zero points; second [E, I, I] mean second moments.
    """
    codes, scales, values = found.codes.clone(), found.scales.clone(), dequantize(found)
    n = weight.shape[-1]
    size = groups_of(n, grid.group_size)
    step = max(size, PANEL // size * size)
    damping = DAMPING * second.diagonal(dim1=-2, dim2=-1).mean(-1)
    with full_float32():
        for start in [*range(0, n, step)] * passes:
            part = slice(start, min(start + step, n))
            groups = slice(part.start // size, part.stop // size)
            better, moved = _round_panel(weight, values, second, damping, part, grid)
            for kept, new, columns in ((codes, moved.codes, part), (scales, moved.scales, groups)):
                kept[..., columns] = torch.where(better, new, kept[..., columns])
            values[..., part] = torch.where(better, dequantize(moved), values[..., part])
    return grid.finish(codes, scales, None)


def _round_panel(
    weight: Tensor, values: Tensor, second: Tensor, damping: Tensor, part: slice, grid: Grid
) -> tuple[Tensor, IntWeight]:
    """The rows [E, O, 1] that gain by new codes and scales of the columns `part`, and these."""
    error = weight - values
    own = second[:, part, part].clone()
    own.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    here = error[..., part]
    across = error @ second[..., part] - here @ second[:, part, part]
    size = groups_of(own.shape[-1], grid.group_size)
    known = gptq_factor(own, size, 0.0)
    target = weight[..., part] + solve(own, across.mT).mT
    swept = gptq_sweep(target.contiguous(), known, grid, size)
    codes, _ = restore(swept, known, False)
    moved = IntWeight(codes, swept.scales.mT.contiguous(), None, grid.bits)
    new = weight[..., part] - dequantize(moved)

    def cost(e: Tensor) -> Tensor:
        return ((e @ own + 2 * across) * e).sum(-1, keepdim=True)

    return cost(new) < cost(here), moved
