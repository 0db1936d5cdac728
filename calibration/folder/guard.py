"""Never worse than a plain search: what error feedback made of a matrix is held against rows that it never saw."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...quantize.integer.grid import IntWeight, dequantize, select
from ...quantize.integer.panel import Grid, Solved
from ...quantize.linear_algebra import full_float32

SAMPLE = 64  # outputs of a matrix by which the two ways of rounding are compared
TOGETHER = 8  # matrices that are rounded plainly at once: each is a float32 copy
PARTS = ("codes", "scales", "zeros", "unit", "biases")


def guarded(weight: Tensor, solved: Solved, grid: Grid, seen: tuple[Tensor, Tensor], stacked: int) -> Solved:
    """The matrices [E, O, I] with those rounded to nearest that err less on held-out rows in that way.

    seen: mean squares of the inputs [E, I], which weigh the search, and the rows [E, R, I], zeros where there are too
    few. stacked: how many matrices each is, by rows; SAMPLE outputs of each decide.
    """
    importance, rows = seen
    experts, outputs, _ = weight.shape
    each = outputs // stacked
    inside = torch.linspace(0, each - 1, min(SAMPLE, each), device=weight.device).round().long()
    chosen = (torch.arange(stacked, device=weight.device).unsqueeze(1) * each + inside).flatten()
    some = weight[:, chosen]
    ways = (of_rows(solved.weight, chosen), grid.round_nearest(some, importance.contiguous()))
    with full_float32():
        found, simple = (
            ((some - dequantize(way)) @ rows.mT).square().sum(-1).view(experts, stacked, -1).sum(-1) for way in ways
        )
    worse = found > simple
    turned = worse.any(1).nonzero().flatten()
    for few in turned.split(TOGETHER) if len(turned) else ():  # nothing splits into one piece of nothing
        plain = grid.round_nearest(weight[few], importance[few].contiguous())
        for place, expert in enumerate(few.tolist()):
            for matrix in worse[expert].nonzero().flatten().tolist():
                rows = slice(matrix * each, (matrix + 1) * each)
                put_rows(solved.weight, expert, select(plain, place), rows)
    return replace(solved, plain=worse)


def of_rows(weight: IntWeight, chosen: Tensor) -> IntWeight:
    """Some outputs [R] of every matrix."""
    parts = {name: getattr(weight, name) for name in PARTS}
    taken = {name: None if part is None else part[:, chosen] for name, part in parts.items()}
    return replace(weight, **taken)


def put_rows(weight: IntWeight, expert: int, plain: IntWeight, rows: slice) -> None:
    """Some outputs of one matrix, in place, from those of `plain` [O, I]."""
    for name in PARTS:
        into, part = getattr(weight, name), getattr(plain, name)
        if into is not None and part is not None:
            into[expert, rows] = part[rows]
