"""SignRound on CUDA (Triton): `signround.rounded_values` and `signround.move`, one pass each."""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .signround import SignRoundState, Start

TILE = 4096  # weights of a program
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _tile(groups, size, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """A program's groups and which exist [ROWS]; the places of their weights and which exist [ROWS, SIZE]."""
    group, inside = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    live = group < groups
    return group, live, group[:, None] * size + inside[None, :], live[:, None] & (inside < size)[None, :]


@triton.jit
def _level(position, table_ptr, low, high, LEVELS: tl.constexpr):
    if LEVELS == 0:
        inside = tl.minimum(tl.maximum(position, low - 1.0), high + 1.0)  # the trick is for small numbers
        return tl.minimum(tl.maximum((inside + ROUNDER) - ROUNDER, low), high)
    below = tl.load(table_ptr)
    level = tl.zeros_like(position) + below
    for i in tl.static_range(1, LEVELS):
        above = tl.load(table_ptr + i)
        level = tl.where(position > (below + above) / 2, above, level)
        below = above
    return level


@triton.jit
def _values_kernel(
    position_ptr, scale_ptr, offset_ptr, table_ptr, out_ptr, groups, size, low, high,
    LEVELS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, live, at, mask = _tile(groups, size, ROWS, SIZE)
    position = tl.load(position_ptr + at, mask=mask, other=0.0)
    value = _level(position, table_ptr, low, high, LEVELS) * tl.load(scale_ptr + group, mask=live, other=0.0)[:, None]
    if OFFSET:
        value += tl.load(offset_ptr + group, mask=live, other=0.0)[:, None]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _move_kernel(
    position_ptr, grad_ptr, scale_ptr, gain_ptr, table_ptr, groups, size, low, high, half, rate, gain_rate,
    LEVELS: tl.constexpr, GAIN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    group, live, at, mask = _tile(groups, size, ROWS, SIZE)
    position = tl.load(position_ptr + at, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=live, other=0.0)
    if GAIN:
        product = tl.sum(grad * _level(position, table_ptr, low, high, LEVELS), 1) * scale
        gain = tl.load(gain_ptr + group, mask=live, other=1.0) - gain_rate * _sign(product)
        tl.store(gain_ptr + group, tl.minimum(tl.maximum(gain, 0.5), 2.0), mask=live)
    free = (position >= low - half) & (position <= high + half)
    moved = position - rate * _sign(grad) * _sign(scale)[:, None]
    tl.store(position_ptr + at, tl.where(free, moved, position), mask=mask)


def _plan(start: Start) -> tuple[int, int, int, int, tuple[int]]:
    """Groups, columns of one, rows and columns of a tile, the grid."""
    groups = start.scales.numel()
    size = start.position.numel() // groups
    wide = triton.next_power_of_2(size)
    rows = max(1, TILE // wide)
    return groups, size, rows, wide, (triton.cdiv(groups, rows),)


def rounded_values(start: Start, state: SignRoundState, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`signround.rounded_values`: [..., O, n] in `dtype`."""
    groups, size, rows, wide, grid = _plan(start)
    out = torch.empty(state.position.shape, dtype=dtype, device=state.position.device)
    levels, table = _table(start)
    offsets = start.scales if start.offsets is None else start.offsets.contiguous()
    _values_kernel[grid](
        state.position, scales.contiguous(), offsets, table, out, groups, size, start.low, start.high, levels,
        start.offsets is not None, rows, wide,
    )  # fmt: skip
    return out


def move(start: Start, state: SignRoundState, grad: Tensor, rate: float, gain_rate: float) -> None:
    """`signround.move`: positions and gains in place."""
    groups, size, rows, wide, grid = _plan(start)
    levels, table = _table(start)
    gain = state.gain if state.gain is not None else start.scales
    _move_kernel[grid](
        state.position, grad.contiguous(), start.scales.contiguous(), gain, table, groups, size, start.low, start.high,
        start.width / 2, rate * start.width, gain_rate, levels, state.gain is not None, rows, wide,
    )  # fmt: skip


def _table(start: Start) -> tuple[int, Tensor]:
    """How many levels the table has (0: integers), and the table, or what stands in for it."""
    return (0, start.scales) if start.table is None else (len(start.table), start.table)
