"""The inside of a GPTQ block on CUDA (Triton): a group's scale search fused with the sweep over its columns.

Same arithmetic as the torch path in `gptq_grid` and `grid`; sums run in another order, so ties may round otherwise.
All tensors are [E, B, O] with outputs contiguous: a program holds B columns of TILE output rows in registers.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import RATIO_LEAST, RATIO_SPAN, RATIOS, code_range
from .panel import Panel

SEARCH_TILE, SEARCH_WARPS = 32, 1
SWEEP_TILE, SWEEP_WARPS = 64, 2
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _rounded(x):
    return (x + ROUNDER) - ROUNDER


@triton.jit
def _bfloat16(x):
    # By hand: the interpreter's conversion truncates.
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(y == 0.0, 1.0, y)


@triton.jit
def _search_kernel(
    values,
    importance,
    scales,
    outputs,
    columns,
    value_expert,
    value_column,
    importance_expert,
    least,
    step,
    RATIOS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, B)
    inside = (row[:, None] < columns) & (out[None, :] < outputs)
    place = expert * value_expert + row[:, None].to(tl.int64) * value_column + out[None, :]
    w = tl.load(values + place, mask=inside, other=0.0)
    h = tl.load(importance + expert * importance_expert + row, mask=row < columns, other=0.0)[:, None]
    most, fewest = tl.max(w, 0), tl.min(w, 0)
    start = tl.where(most > -fewest, most, fewest) / LOW
    best_scale = _bfloat16(start)
    code = tl.minimum(tl.maximum(_rounded(w / best_scale[None, :]), LOW), HIGH)
    cross, square = tl.sum(w * code * h, 0), tl.sum(code * code * h, 0)
    best = best_scale * (best_scale * square - 2.0 * cross)
    refit = _bfloat16(cross / tl.maximum(square, 1e-38))
    refitted = refit * (refit * square - 2.0 * cross)
    best_scale = tl.where(refitted < best, refit, best_scale)
    best = tl.minimum(best, refitted)
    for index in range(2 * RATIOS):
        ratio = least + step * (index // 2)
        ratio = tl.where(index % 2 == 0, ratio, -ratio)
        scale = _bfloat16(start * ratio)
        code = tl.minimum(tl.maximum(_rounded(w / scale[None, :]), LOW), HIGH)
        cross, square = tl.sum(w * code * h, 0), tl.sum(code * code * h, 0)
        error = scale * (scale * square - 2.0 * cross)
        refit = _bfloat16(cross / tl.maximum(square, 1e-38))
        refitted = refit * (refit * square - 2.0 * cross)
        scale = tl.where(refitted < error, refit, scale)
        error = tl.minimum(error, refitted)
        better = error < best
        best = tl.where(better, error, best)
        best_scale = tl.where(better, scale, best_scale)
    tl.store(scales + expert * outputs + out, best_scale, mask=out < outputs)


@triton.jit
def _sweep_kernel(
    part,
    columns,
    triangle,
    scales,
    zeros,
    codes,
    errors,
    outputs,
    expert_stride,
    column_stride,
    triangle_expert,
    triangle_row,
    COUNT: tl.constexpr,
    ZEROS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = out < outputs
    row = tl.arange(0, B)
    inside = (row[:, None] < COUNT) & used[None, :]
    base = expert * expert_stride
    place = base + row[:, None].to(tl.int64) * column_stride + out[None, :]
    values = tl.load(part + place, mask=inside, other=0.0)
    scale = tl.load(scales + expert * outputs + out, mask=used, other=1.0)
    zero = tl.zeros_like(scale)
    if ZEROS:
        zero = tl.load(zeros + expert * outputs + out, mask=used, other=0.0)
    for back in range(COUNT):
        k = COUNT - 1 - back
        here = base + k * column_stride + out
        value = tl.sum(tl.where(row[:, None] == k, values, 0.0), 0)
        code = tl.minimum(tl.maximum(_rounded(value / scale + zero), LOW), HIGH)
        error = tl.load(columns + here, mask=used, other=0.0) - (code - zero) * scale
        tl.store(codes + here, code.to(tl.int8), mask=used)
        tl.store(errors + here, error, mask=used)
        lower = tl.load(triangle + expert * triangle_expert + k * triangle_row + row, mask=row < k, other=0.0)
        values += lower[:, None] * error[None, :]
    tl.store(part + place, values, mask=inside)


def search_group(values: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Symmetric signed scales [E, O] of one group: values [E, B, O], importance [E, B]; as `grid.search`."""
    experts, columns, outputs = values.shape
    importance = importance.contiguous()
    scales = torch.empty(experts, outputs, device=values.device)
    low, high = code_range(bits)
    grid = (triton.cdiv(outputs, SEARCH_TILE), experts)
    _search_kernel[grid](  # type: ignore[reportIndexIssue]
        values,
        importance,
        scales,
        outputs,
        columns,
        values.stride(0),
        values.stride(1),
        importance.stride(0),
        RATIO_LEAST,
        RATIO_SPAN / (RATIOS - 1),
        RATIOS=RATIOS,  # type: ignore[arg-type]
        LOW=low,  # type: ignore[arg-type]
        HIGH=high,  # type: ignore[arg-type]
        B=triton.next_power_of_2(columns),  # type: ignore[arg-type]
        TILE=SEARCH_TILE,  # type: ignore[arg-type]
        num_warps=SEARCH_WARPS,  # type: ignore[call-arg]
    )
    return scales


def sweep_block(panel: Panel, grids: tuple[Tensor, Tensor | None], bits: int) -> None:
    """The fused form of `gptq_grid.sweep_block`: same arguments, same results."""
    part, columns, triangle, codes, errors = panel.part, panel.columns, panel.triangle, panel.codes, panel.errors
    assert triangle is not None
    assert errors is not None
    experts, count, outputs = part.shape
    strides = {t.stride() for t in (part, columns, codes, errors)}
    assert len(strides) == 1, strides
    assert triangle.stride(-1) == part.stride(-1) == 1, (triangle.stride(), part.stride())
    low, high = code_range(bits)
    scale, zero = grids
    grid = (triton.cdiv(outputs, SWEEP_TILE), experts)
    _sweep_kernel[grid](  # type: ignore[reportIndexIssue]
        part,
        columns,
        triangle,
        scale.contiguous(),
        zero if zero is not None else scale,
        codes,
        errors,
        outputs,
        part.stride(0),
        part.stride(1),
        triangle.stride(0),
        triangle.stride(1),
        COUNT=count,  # type: ignore[arg-type]
        ZEROS=zero is not None,  # type: ignore[arg-type]
        LOW=low,  # type: ignore[arg-type]
        HIGH=high,  # type: ignore[arg-type]
        B=triton.next_power_of_2(count),  # type: ignore[arg-type]
        TILE=SWEEP_TILE,  # type: ignore[arg-type]
        num_warps=SWEEP_WARPS,  # type: ignore[call-arg]
    )
