"""`columns` on CUDA (Triton), fused: `sweep_inner` and `descend_inner` of MINI columns.

Same arithmetic; sums run in another order, so ties may round otherwise. All tensors are [c, E, R] with rows contiguous,
the first (target or pull) with strides of its own: a program holds its columns of TILE rows of a matrix in registers.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .columns import Block

TILE, WARPS = 64, 2
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _level(y, step, levels, LOWEST: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Code and level nearest to y at `step`; COUNT uneven levels, or 0 for the whole numbers LOWEST .. TOP."""
    scaled = tl.where(step == 0.0, 0.0, y / tl.where(step == 0.0, 1.0, step))
    if COUNT == 0:
        # Clamped first: the trick rounds only what is small.
        level = (tl.minimum(tl.maximum(scaled, LOWEST), TOP) + ROUNDER) - ROUNDER
        code = level - FIRST
    else:
        code = tl.zeros_like(scaled)
        level = tl.zeros_like(scaled) + tl.load(levels)
        below = tl.load(levels)
        for i in tl.static_range(1, COUNT):
            above = tl.load(levels + i)
            beyond = scaled > (below + above) * 0.5
            code += beyond.to(tl.float32)
            level = tl.where(beyond, above, level)
            below = above
    return code, level


@triton.jit
def _rounded(
    wanted, here, used, decoded, step, minimum, codes, levels,
    MINIMUM: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The value nearest to `wanted`, stored at `here` with its code."""
    scale = tl.load(step + here, mask=used, other=0.0)
    low = tl.zeros_like(wanted)
    if MINIMUM:
        low = tl.load(minimum + here, mask=used, other=0.0)
    code, level = _level(wanted + low, scale, levels, LOWEST, TOP, FIRST, LEVELS)
    found = scale * level - low
    tl.store(codes + here, code.to(tl.int32).to(tl.uint8), mask=used)
    tl.store(decoded + here, found, mask=used)
    return found


@triton.jit
def _sweep_kernel(
    target, weight, decoded, step, minimum, codes, lower, levels, rows, column_stride, value_column, value_expert,
    lower_expert, lower_row,
    MINIMUM: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = out < rows
    row = tl.arange(0, B)
    base = expert * rows
    place = expert * value_expert + row[:, None].to(tl.int64) * value_column + out[None, :]
    values = tl.load(target + place, mask=used[None, :], other=0.0)
    for back in range(B):
        k = B - 1 - back
        here = base + k * column_stride + out
        value = tl.sum(tl.where(row[:, None] == k, values, 0.0), 0)
        found = _rounded(value, here, used, decoded, step, minimum, codes, levels, MINIMUM, LOWEST, TOP, FIRST, LEVELS)
        error = tl.load(weight + here, mask=used, other=0.0) - found
        tl.store(target + expert * value_expert + k * value_column + out, error, mask=used)
        factor = tl.load(lower + expert * lower_expert + k * lower_row + row, mask=row < k, other=0.0)
        values += factor[:, None] * error[None, :]


@triton.jit
def _descend_kernel(
    pull, decoded, step, minimum, codes, moments, levels, rows, column_stride, value_column, value_expert,
    moments_expert, moments_row,
    MINIMUM: tl.constexpr, LOWEST: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr, LEVELS: tl.constexpr,
    B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = out < rows
    row = tl.arange(0, B)
    base = expert * rows
    place = expert * value_expert + row[:, None].to(tl.int64) * value_column + out[None, :]
    values = tl.load(pull + place, mask=used[None, :], other=0.0)
    for back in range(B):
        k = B - 1 - back
        here = base + k * column_stride + out
        value = tl.sum(tl.where(row[:, None] == k, values, 0.0), 0)
        before = tl.load(decoded + here, mask=used, other=0.0)
        line = moments + expert * moments_expert + k * moments_row
        wanted = before + value / tl.load(line + k)
        found = _rounded(wanted, here, used, decoded, step, minimum, codes, levels, MINIMUM, LOWEST, TOP, FIRST, LEVELS)
        change = found - before
        tl.store(pull + expert * value_expert + k * value_column + out, change, mask=used)
        factor = tl.load(line + row, mask=row < k, other=0.0)
        values -= factor[:, None] * change[None, :]


def sweep_inner(block: Block, inner: slice, target: Tensor, weight: Tensor, decoded: Tensor, lower: Tensor) -> None:
    """As `columns.sweep_inner`."""
    parts = _parts(block, inner, target, weight, decoded)
    _launch(_sweep_kernel, block, parts, lower[:, inner, inner])


def descend_inner(block: Block, inner: slice, pull: Tensor, decoded: Tensor, moments: Tensor) -> None:
    """As `columns.descend_inner`."""
    parts = _parts(block, inner, pull, decoded)
    _launch(_descend_kernel, block, parts, moments[:, inner, inner])


def _parts(block: Block, inner: slice, *tensors: Tensor) -> list[Tensor]:
    """The columns `inner` of the tensors, then of steps, minimums and codes."""
    minimum = block.step if block.minimum is None else block.minimum
    parts = [tensor[inner] for tensor in (*tensors, block.step, minimum, block.codes)]
    assert all(part.is_contiguous() for part in parts[1:])
    assert parts[0].stride(2) == 1, parts[0].stride()
    return parts


def _launch(kernel: object, block: Block, parts: list[Tensor], triangle: Tensor) -> None:
    count, experts, rows = parts[0].shape
    form = block.grid.form
    assert count == triton.next_power_of_2(count), count
    assert triangle.stride(-1) == 1, triangle.stride()
    kernel[(triton.cdiv(rows, TILE), experts)](  # type: ignore[index]
        *parts,
        triangle,
        block.grid.levels,
        rows,
        experts * rows,
        parts[0].stride(0),
        parts[0].stride(1),
        triangle.stride(0),
        triangle.stride(1),
        MINIMUM=block.minimum is not None,
        LOWEST=float(form.lowest),
        TOP=float(form.levels[-1]),
        FIRST=float(form.levels[0]),
        LEVELS=0 if form.uniform else len(form.levels),
        B=count,
        TILE=TILE,
        num_warps=WARPS,
    )
