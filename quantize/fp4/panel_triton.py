"""Scale search and error feedback of FP4 panels on CUDA (Triton); same arithmetic as `panel_cpu`.

A group is searched and swept by one kernel each; a product of matrices carries its errors to the panel's other groups.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..integer.gptq import Panel
    from .grid import Fp4Grid

SEARCH_TILE, SEARCH_WARPS = 64, 1
SWEEP_TILE, SWEEP_WARPS = 128, 1
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
def _search_kernel(
    values, importance, scales, outputs, value_expert, value_column, importance_expert, scale_expert,
    BELOW: tl.constexpr, TRIES: tl.constexpr, UNIT: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, B)
    used = out < outputs
    place = expert * value_expert + row[:, None].to(tl.int64) * value_column + out[None, :]
    w = tl.load(values + place, mask=used[None, :], other=0.0)
    h = tl.load(importance + expert * importance_expert + row)[:, None]
    most = tl.maximum(tl.max(tl.abs(w), 0), 12.0 * TINY)
    base = (most / 12.0).to(tl.int32, bitcast=True) & (-UNIT)
    best = tl.full((TILE,), 3e38, tl.float32)
    found = base
    for index in range(TRIES):
        bits = base + (index - BELOW) * UNIT
        tried = bits.to(tl.float32, bitcast=True)
        code = _level(w * (1.0 / tried)[None, :])
        weighted = h * code
        cross, square = tl.sum(weighted * w, 0), tl.sum(weighted * code, 0)
        error = tried * (tried * square - 2.0 * cross)
        better = error < best
        best = tl.where(better, error, best)
        found = tl.where(better, bits, found)
    tl.store(scales + expert * scale_expert + out, found.to(tl.float32, bitcast=True), mask=used)


@triton.jit
def _sweep_kernel(
    part, columns, triangle, scales, codes, errors, outputs, part_expert, part_column, columns_expert, columns_column,
    code_expert, code_column, triangle_expert, triangle_row, scale_expert,
    FEEDBACK: tl.constexpr, B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = out < outputs
    row = tl.arange(0, B)
    place = expert * part_expert + row[:, None].to(tl.int64) * part_column + out[None, :]
    values = tl.load(part + place, mask=used[None, :], other=0.0)
    scale = tl.load(scales + expert * scale_expert + out, mask=used, other=1.0)
    inverse = 1.0 / scale
    for back in range(B):
        k = B - 1 - back
        value = tl.sum(tl.where(row[:, None] == k, values, 0.0), 0)
        level = _level(value * inverse)
        tl.store(codes + expert * code_expert + k * code_column + out, level.to(tl.int8), mask=used)
        if FEEDBACK:
            here = expert * columns_expert + k * columns_column + out
            error = tl.load(columns + here, mask=used, other=0.0) - level * scale
            tl.store(errors + here, error, mask=used)
            lower = tl.load(triangle + expert * triangle_expert + k * triangle_row + row, mask=row < k, other=0.0)
            values += lower[:, None] * error[None, :]
    if FEEDBACK:
        tl.store(part + place, values, mask=used[None, :])


def round_columns(grid: Fp4Grid, panel: Panel, importance: Tensor, scales: Tensor, search: bool) -> None:
    """As `grid.round_columns`; importance [E, P] weighs squared errors."""
    size, feedback = grid.group_size, panel.triangle is not None
    for stop in range(panel.part.shape[1], 0, -size):
        start = stop - size
        group = panel.part[:, start:stop]
        if feedback and stop < panel.part.shape[1]:
            assert panel.triangle is not None
            assert panel.errors is not None
            torch.baddbmm(group, panel.triangle[:, stop:, start:stop].mT, panel.errors[:, stop:], out=group)
        if search:
            search_group(grid, group, importance[:, start:stop], scales[:, start // size])
        sweep_group(panel, slice(start, stop), scales[:, start // size])


def search_group(grid: Fp4Grid, values: Tensor, importance: Tensor, scales: Tensor) -> None:
    """The best scales [E, O] of a group's values [E, B, O]; importance [E, B]."""
    experts, columns, outputs = values.shape
    assert values.stride(-1) == importance.stride(-1) == scales.stride(-1) == 1
    cells = (triton.cdiv(outputs, SEARCH_TILE), experts)
    _search_kernel[cells](  # type: ignore[reportIndexIssue]
        values, importance, scales, outputs, values.stride(0), values.stride(1), importance.stride(0), scales.stride(0),
        BELOW=grid.below, TRIES=grid.below + grid.above + 1, UNIT=1 << (23 - grid.mantissa), B=columns,  # type: ignore[arg-type]
        TILE=SEARCH_TILE, num_warps=SEARCH_WARPS,  # type: ignore[arg-type]
    )  # fmt: skip


def sweep_group(panel: Panel, group: slice, scales: Tensor) -> None:
    """Codes of a group's columns under scales [E, O], with errors and what was rounded where they are fed back."""
    part, columns, codes = panel.part[:, group], panel.columns[:, group], panel.codes[:, group]
    triangle = part if panel.triangle is None else panel.triangle[:, group, group]
    errors = part if panel.errors is None else panel.errors[:, group]
    experts, count, outputs = part.shape
    assert panel.errors is None or errors.stride() == columns.stride()
    assert part.stride(-1) == codes.stride(-1) == triangle.stride(-1) == 1
    cells = (triton.cdiv(outputs, SWEEP_TILE), experts)
    _sweep_kernel[cells](  # type: ignore[reportIndexIssue]
        part, columns, triangle, scales, codes, errors, outputs, part.stride(0), part.stride(1),
        columns.stride(0), columns.stride(1), codes.stride(0), codes.stride(1), triangle.stride(0), triangle.stride(1),
        scales.stride(0), FEEDBACK=panel.triangle is not None, B=count,  # type: ignore[arg-type]
        TILE=SWEEP_TILE, num_warps=SWEEP_WARPS,  # type: ignore[arg-type]
    )  # fmt: skip
