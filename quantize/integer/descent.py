"""Block coordinate descent after error feedback: each panel of columns is rounded again, all others held.

With e = W - Q the objective tr(e H e^T) is, in the columns P of a panel, quadratic: its minimum over real e_P is at
-c H_PP^-1, c what the other columns' errors weigh on the panel. So Q_P is rounded anew at W_P + c H_PP^-1, with scales
searched and errors fed back inside the panel under H_PP. A row keeps its panel where that is no better: the objective
never rises. One sweep of GPTQ decides each column before it knows the errors of those before it; here all are known.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..linear_algebra import full_float32, inv
from .gptq import DAMPING, gptq_factor, gptq_sweep, restore
from .grid import IntWeight, dequantize, groups_of
from .panel import Grid, Solved

PANEL = 64


def descend(weight: Tensor, solved: Solved, second: Tensor, grid: Grid, passes: int = 1) -> Solved:
    """The same matrices with a smaller error of their outputs, measured by `second` damped as for GPTQ.

    weight [E, O, I] float32; solved: what error feedback found, without zero points; second [E, I, I] mean second
    moments. What was rounded (`compensated`, changed in place) follows. On CUDA products of errors and moments round
    their factors to TF32.
    """
    found, n = solved.weight, weight.shape[-1]
    codes, scales, error = found.codes.clone(), found.scales.clone(), weight - dequantize(found)
    biases = None if found.biases is None else found.biases.clone()
    size = groups_of(n, grid.group_size)
    step = max(size, PANEL // size * size)
    damping = DAMPING * second.diagonal(dim1=-2, dim2=-1).mean(-1)
    for start in [*range(0, n, step)] * passes:
        part = slice(start, min(start + step, n))
        groups = slice(part.start // size, part.stop // size)
        keep = solved.compensated is not None
        better, moved, target = _round_panel(weight, error, second, damping, part, grid, keep)
        codes[..., part] = torch.where(better, moved.codes, codes[..., part])
        scales[..., groups] = torch.where(better, moved.scales, scales[..., groups])
        if biases is not None and moved.biases is not None:
            biases[..., groups] = torch.where(better, moved.biases, biases[..., groups])
        error[..., part] = torch.where(better, weight[..., part] - dequantize(moved), error[..., part])
        if solved.compensated is not None and target is not None:
            solved.compensated[..., part] = torch.where(better, target, solved.compensated[..., part])
    return replace(solved, weight=grid.finish(codes, scales, biases))


def _round_panel(
    weight: Tensor, error: Tensor, second: Tensor, damping: Tensor, part: slice, grid: Grid, keep: bool
) -> tuple[Tensor, IntWeight, Tensor | None]:
    """The rows [E, O, 1] that gain by new codes and scales of the columns `part`; these, and what was rounded."""
    own = second[:, part, part].clone()
    here = error[..., part]
    with full_float32(False):
        across = error @ second[..., part]
    with full_float32():
        across -= here @ own
        own.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        size = groups_of(own.shape[-1], grid.group_size)
        known = gptq_factor(own, size, 0.0)
        target = weight[..., part] + across @ inv(own)
        swept = gptq_sweep(target, known, grid, size)
        codes, rounded = restore(swept, known, keep)
        biases = None if swept.zeros is None else swept.zeros.mT.contiguous()
        moved = IntWeight(codes, swept.scales.mT.contiguous(), None, grid.bits, biases=biases)
        new = weight[..., part] - dequantize(moved)
        rise = ((new @ own + 2 * across) * new - (here @ own + 2 * across) * here).sum(-1, keepdim=True)
    return rise < 0, moved, rounded
