"""Scale search and error feedback of FP4 panels on CUDA (Triton); same arithmetic as `panel_cpu`.

A kernel searches the scales of a group and rounds it; a product of matrices carries its errors to the panel's others.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..integer.panel import Panel
    from .grid import Fp4Grid

TILE, WARPS = 64, 1
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even
TINY = tl.constexpr(2.0**-100)


@triton.jit
def _level(x):
    """The nearest level, as `levels.nearest`."""
    size = tl.minimum(tl.abs(x), 12.0)
    step = tl.where(size < 4.0, 1.0, tl.where(size < 8.0, 2.0, 4.0))
    inverse = tl.where(size < 4.0, 1.0, tl.where(size < 8.0, 0.5, 0.25))
    level = ((size * inverse + ROUNDER) - ROUNDER) * step
    return tl.where(x < 0.0, -level, level)


@triton.jit
def _feed(values, value, columns, triangle, k, row, used, triangle_row):
    """The error of column k, and a group's values with it fed in."""
    error = tl.load(columns, mask=used, other=0.0) - value
    lower = tl.load(triangle + k * triangle_row + row, mask=row < k, other=0.0)
    return error, values + lower[:, None] * error[None, :]


@triton.jit
def _group_kernel(
    part, columns, triangle, importance, scales, codes, errors, outputs, part_expert, part_column, columns_expert,
    columns_column, code_expert, code_column, triangle_expert, triangle_row, importance_expert, scale_expert,
    BELOW: tl.constexpr, TRIES: tl.constexpr, UNIT: tl.constexpr, SEARCH: tl.constexpr, FEEDBACK: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = out < outputs
    row = tl.arange(0, B)
    place = expert * part_expert + row[:, None].to(tl.int64) * part_column + out[None, :]
    values = tl.load(part + place, mask=used[None, :], other=0.0)
    columns += expert * columns_expert + out
    triangle += expert * triangle_expert
    importance += expert * importance_expert
    scale_at = scales + expert * scale_expert + out
    if SEARCH:
        h = tl.load(importance + row)[:, None]
        most = tl.maximum(tl.max(tl.abs(values), 0), 12.0 * TINY)
        base = (most / 12.0).to(tl.int32, bitcast=True) & (-UNIT)
        best = tl.full((TILE,), 3e38, tl.float32)
        scale = base.to(tl.float32, bitcast=True)
        for index in range(TRIES):
            tried = (base + (index - BELOW) * UNIT).to(tl.float32, bitcast=True)
            inverse = 1.0 / tried
            if FEEDBACK:
                moved = values
                error = tl.zeros((TILE,), tl.float32)
                for back in range(B):
                    k = B - 1 - back
                    value = tl.sum(tl.where(row[:, None] == k, moved, 0.0), 0)
                    off = value - _level(value * inverse) * tried
                    error += tl.load(importance + k) * off * off
                    _, moved = _feed(
                        moved, value - off, columns + k * columns_column, triangle, k, row, used, triangle_row
                    )
            else:
                code = _level(values * inverse[None, :])
                weighted = h * code
                cross, square = tl.sum(weighted * values, 0), tl.sum(weighted * code, 0)
                error = tried * (tried * square - 2.0 * cross)
            better = error < best
            best = tl.where(better, error, best)
            scale = tl.where(better, tried, scale)
        tl.store(scale_at, scale, mask=used)
    else:
        scale = tl.load(scale_at, mask=used, other=1.0)
    inverse = 1.0 / scale
    for back in range(B):
        k = B - 1 - back
        level = _level(tl.sum(tl.where(row[:, None] == k, values, 0.0), 0) * inverse)
        tl.store(codes + expert * code_expert + k * code_column + out, level.to(tl.int8), mask=used)
        if FEEDBACK:
            here = k * columns_column
            error, values = _feed(values, level * scale, columns + here, triangle, k, row, used, triangle_row)
            tl.store(errors + expert * columns_expert + here + out, error, mask=used)
    if FEEDBACK:
        tl.store(part + place, values, mask=used[None, :])


def round_columns(grid: Fp4Grid, panel: Panel, importance: Tensor, scales: Tensor, search: bool) -> None:
    """As `grid.round_columns`; importance [E, P] weighs squared errors."""
    size = grid.group_size
    for stop in range(panel.part.shape[1], 0, -size):
        group = slice(stop - size, stop)
        if panel.triangle is not None and panel.errors is not None and stop < panel.part.shape[1]:
            part = panel.part[:, group]
            torch.baddbmm(part, panel.triangle[:, stop:, group].mT, panel.errors[:, stop:], out=part)
        round_group(grid, panel, group, importance[:, group], scales[:, group.start // size], search)


def round_group(grid: Fp4Grid, panel: Panel, group: slice, importance: Tensor, scales: Tensor, search: bool) -> None:
    """A group's columns under scales [E, O]; importance [E, B]. Errors stay inside the group."""
    part, columns, codes = panel.part[:, group], panel.columns[:, group], panel.codes[:, group]
    triangle = part if panel.triangle is None else panel.triangle[:, group, group]
    errors = part if panel.errors is None else panel.errors[:, group]
    experts, count, outputs = part.shape
    assert panel.errors is None or errors.stride() == columns.stride()
    for tensor in (part, columns, codes, triangle, importance, scales):
        assert tensor.stride(-1) == 1, tensor.stride()
    cells = (triton.cdiv(outputs, TILE), experts)
    _group_kernel[cells](  # type: ignore[reportIndexIssue]
        part, columns, triangle, importance, scales, codes, errors, outputs, part.stride(0), part.stride(1),
        columns.stride(0), columns.stride(1), codes.stride(0), codes.stride(1), triangle.stride(0), triangle.stride(1),
        importance.stride(0), scales.stride(0), BELOW=grid.below, TRIES=grid.below + grid.above + 1,  # type: ignore[arg-type]
        UNIT=1 << (23 - grid.mantissa), SEARCH=search, FEEDBACK=panel.triangle is not None, B=count,  # type: ignore[arg-type]
        TILE=TILE, num_warps=WARPS,  # type: ignore[arg-type]
    )  # fmt: skip
