"""The search for a group's scale and bias on CUDA (Triton): as `search_cpu`, by the same five sums.

All tensors are [E, P, O] with outputs contiguous: a program holds the P columns of TILE output rows in registers.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import ENDS, LEAST, MOST

TILE, WARPS = 32, 1
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest integer, ties to even
FLAT = tl.constexpr(1e-6)


@triton.jit
def _bfloat16(x):
    # By hand: the interpreter's conversion truncates.
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _usable(x):
    y = _bfloat16(x)
    return tl.where(y == 0.0, 1.0, y)


@triton.jit
def _error(scale, moved, sq, sqq, sqx, sx, sxx, total):
    """Of values scale * code + moved, weights and `moved` less the middle."""
    error = sxx - 2.0 * (scale * sqx + moved * sx) + scale * (scale * sqq + 2.0 * moved * sq)
    return error + moved * moved * total


@triton.jit
def _search_kernel(
    values, importance, scales, biases, outputs, columns, value_expert, value_column, least, step,
    ENDS: tl.constexpr, TOP: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.arange(0, P)
    inside = (row[:, None] < columns) & (out[None, :] < outputs)
    place = expert * value_expert + row[:, None].to(tl.int64) * value_column + out[None, :]
    w = tl.load(values + place, mask=inside, other=0.0)
    h = tl.load(importance + expert * columns + row, mask=row < columns, other=0.0)[:, None]
    low_end = tl.min(tl.where(row[:, None] < columns, w, float("inf")), 0)
    high_end = tl.max(tl.where(row[:, None] < columns, w, float("-inf")), 0)
    middle, half = (low_end + high_end) * 0.5, (high_end - low_end) * 0.5
    x = tl.where(row[:, None] < columns, w - middle[None, :], 0.0)
    total, sx, sxx = tl.sum(h), tl.sum(h * x, 0), tl.sum(h * x * x, 0)
    best = tl.full((TILE,), float("inf"), tl.float32)
    best_scale, best_bias = tl.full((TILE,), 1.0, tl.float32), _bfloat16(middle)
    for index in range(ENDS * ENDS):
        low = _bfloat16(middle - (least + step * (index // ENDS)) * half)
        scale = _usable((middle + (least + step * (index % ENDS)) * half - low) / TOP)
        code = tl.minimum(tl.maximum(((w - low[None, :]) / scale[None, :] + ROUNDER) - ROUNDER, 0.0), TOP)
        sq, sqq, sqx = tl.sum(h * code, 0), tl.sum(h * code * code, 0), tl.sum(h * code * x, 0)
        error = _error(scale, low - middle, sq, sqq, sqx, sx, sxx, total)
        better = error < best
        best = tl.where(better, error, best)
        best_scale, best_bias = tl.where(better, scale, best_scale), tl.where(better, low, best_bias)
        square, cross = sqq - sq * sq / total, sqx - sq * sx / total
        told = square > total * FLAT  # apart: equal codes have no scale
        fitted = _usable(tl.where(told, cross / tl.maximum(square, 1e-38), 1.0))
        base = _bfloat16(middle + (sx - fitted * sq) / total)
        error = _error(fitted, base - middle, sq, sqq, sqx, sx, sxx, total)
        better = (error < best) & told
        best = tl.where(better, error, best)
        best_scale, best_bias = tl.where(better, fitted, best_scale), tl.where(better, base, best_bias)
    tl.store(scales + expert * outputs + out, best_scale, mask=out < outputs)
    tl.store(biases + expert * outputs + out, best_bias, mask=out < outputs)


def search_panel(part: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias [E, O] of part [E, P, O]; as `grid.search_panel`."""
    experts, columns, outputs = part.shape
    scales, biases = (torch.empty(experts, outputs, device=part.device) for _ in range(2))
    assert part.stride(-1) == 1, part.stride()
    _search_kernel[(triton.cdiv(outputs, TILE), experts)](  # type: ignore[reportIndexIssue]
        part, importance.contiguous(), scales, biases, outputs, columns, part.stride(0), part.stride(1),
        LEAST[bits], (MOST - LEAST[bits]) / (ENDS - 1),
        ENDS=ENDS, TOP=float((1 << bits) - 1), P=triton.next_power_of_2(columns), TILE=TILE,  # type: ignore[arg-type]
        num_warps=WARPS,  # type: ignore[call-arg]
    )  # fmt: skip
    return scales, biases
