"""Reduce routed rows on CUDA in one reading: squares and maxima per channel, x^T x and a^T b per expert.

Rows are sorted by expert, expert e owning offsets[e]:offsets[e+1]. One program adds a part of one expert's rows in a
fixed order: no atomics, equal runs give equal bits. Shapes: R rows, n inputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 128  # tile of the column sums; columns a multiple of 32
ABS_MAX_ROWS = 256  # per program of `column_abs_max`
GRAM = (128, 256, 64, 3)  # products: tile height and width, rows at once, stages; measured on an H200


@dataclass(frozen=True)
class ColumnSums:
    """plain, weighted [E, n]: sums of x^2 and s^2 x^2; abs_max [E, n] of |x|; sum16, sum32 [E]; bad: NaN and inf."""

    plain: Tensor
    weighted: Tensor
    abs_max: Tensor
    sum16: Tensor
    sum32: Tensor
    bad: Tensor


@triton.jit
def _column_kernel(
    x,
    row_weight,
    offsets,
    scaled,
    plain,
    weighted,
    abs_max,
    largest16,
    largest32,
    bad,
    n,
    SCALE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    expert, tile, tiles = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    column = tile * C + tl.arange(0, C)
    inside = column < n
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    squares = tl.zeros((R, C), tl.float32)
    heavy = tl.zeros((R, C), tl.float32)
    high = tl.zeros((R, C), tl.float32)
    wrong = tl.zeros((R, C), tl.float32)
    high16 = tl.zeros((R, C // 16), tl.float32)
    high32 = tl.zeros((R, C // 32), tl.float32)
    for first in range(start, stop, R):
        row = first + tl.arange(0, R)
        live = row < stop
        place = row[:, None].to(tl.int64) * n + column[None, :]
        v = tl.load(x + place, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        s = tl.load(row_weight + row, mask=live, other=0.0)
        if SCALE:
            w = (v * s[:, None]).to(scaled.dtype.element_ty)
            tl.store(scaled + place, w, mask=live[:, None] & inside[None, :])
        v2 = v * v
        squares += v2
        heavy += v2 * (s * s)[:, None]
        size = tl.abs(v)
        high = tl.maximum(high, size)
        wrong += tl.where(size < float("inf"), 0.0, 1.0)  # NaN compares false
        by16 = tl.sum(tl.reshape(v, (R, C // 16, 16)), 2)
        by32 = tl.sum(tl.reshape(v, (R, C // 32, 32)), 2)
        high16 = tl.maximum(high16, tl.abs(by16))
        high32 = tl.maximum(high32, tl.abs(by32))
    out = expert.to(tl.int64) * n + column
    tl.store(plain + out, tl.sum(squares, 0), mask=inside)
    tl.store(weighted + out, tl.sum(heavy, 0), mask=inside)
    tl.store(abs_max + out, tl.max(high, 0), mask=inside)
    tl.store(largest16 + expert * tiles + tile, tl.max(tl.max(high16, 1), 0))
    tl.store(largest32 + expert * tiles + tile, tl.max(tl.max(high32, 1), 0))
    tl.store(bad + expert * tiles + tile, tl.sum(tl.sum(wrong, 1), 0))


def column_sums(x: Tensor, row_weight: Tensor, offsets: Tensor, scaled: Tensor | None = None) -> ColumnSums:
    """x [R, n] contiguous bfloat16 or float32, share [R] float32, offsets [E + 1] int32: sums of each expert's rows.

    scaled [R, n], of x's dtype: filled with s * x, rounded once.
    """
    n, experts = x.shape[1], len(offsets) - 1
    tiles = triton.cdiv(n, COLUMNS)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    plain, weighted, abs_max = empty(experts, n), empty(experts, n), empty(experts, n)
    largest16, largest32, bad = empty(experts, tiles), empty(experts, tiles), empty(experts, tiles)
    launch: Any = _column_kernel[(tiles, experts)]  # type: ignore[reportIndexIssue]
    launch(
        x,
        row_weight,
        offsets,
        x if scaled is None else scaled,
        plain,
        weighted,
        abs_max,
        largest16,
        largest32,
        bad,
        n,
        SCALE=scaled is not None,
        R=ROWS,
        C=COLUMNS,
        num_warps=4,
    )
    return ColumnSums(plain, weighted, abs_max, largest16.amax(1), largest32.amax(1), bad.sum())


@triton.jit
def _segment_kernel(values, offsets, sums, squares, W: tl.constexpr):
    expert = tl.program_id(0)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total, square = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for first in range(start, stop, W):
        row = first + tl.arange(0, W)
        v = tl.load(values + row, mask=row < stop, other=0.0)
        total += v
        square += v * v
    tl.store(sums + expert, tl.sum(total, 0))
    tl.store(squares + expert, tl.sum(square, 0))


def segment_sums(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """values [R] float32 -> sums [E] of them and of their squares."""
    experts = len(offsets) - 1
    sums = torch.empty(experts, dtype=torch.float32, device=values.device)
    squares = torch.empty_like(sums)
    launch: Any = _segment_kernel[(experts,)]  # type: ignore[reportIndexIssue]
    launch(values, offsets, sums, squares, W=1024, num_warps=4)
    return sums, squares


@triton.jit
def _gram_kernel(x, offsets, total, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    # A program a tile of M x N that reaches the lower triangle; N is a multiple of M.
    expert = tl.program_id(1)
    index = tl.program_id(0)
    i = index * 0
    before = index * 0
    while before + i * M // N + 1 <= index:
        before += i * M // N + 1
        i += 1
    j = index - before
    left, right = i * M + tl.arange(0, M), j * N + tl.arange(0, N)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((M, N), tl.float32)
    for first in range(start, stop, K):
        row = first + tl.arange(0, K)
        live = (row < stop)[:, None]
        place = row[:, None].to(tl.int64) * n
        a = tl.load(x + place + left[None, :], mask=live & (left < n)[None, :], other=0.0)
        b = tl.load(x + place + right[None, :], mask=live & (right < n)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc)
    base = total + expert.to(tl.int64) * n * n
    below = (left < n)[:, None] & (left[:, None] >= right[None, :])
    here = base + left[:, None].to(tl.int64) * n + right[None, :]
    acc += tl.load(here, mask=below, other=0.0)
    tl.store(here, acc, mask=below)


def add_grams(total: Tensor, x: Tensor, offsets: Tensor) -> None:
    """Lower triangles of total [E, n, n] float32 += those of x_e^T x_e; x [R, n] contiguous bfloat16.

    Half the arithmetic of a general product. What is above the diagonal is left alone: `mirror` fills it in the end.
    """
    n = x.shape[1]
    high, wide, depth, stages = GRAM
    grid = (sum(i * high // wide + 1 for i in range(triton.cdiv(n, high))), len(offsets) - 1)
    launch: Any = _gram_kernel[grid]  # type: ignore[reportIndexIssue]
    launch(x, offsets, total, n, M=high, N=wide, K=depth, num_warps=8, num_stages=stages)


@triton.jit
def _product_kernel(
    a,
    token,
    b,
    offsets,
    total,
    m,
    n,
    INDEXED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    expert, tile, wide = tl.program_id(1), tl.program_id(0), tl.cdiv(n, N)
    left, right = tile // wide * M + tl.arange(0, M), tile % wide * N + tl.arange(0, N)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    acc = tl.zeros((M, N), tl.float32)
    for first in range(start, stop, K):
        row = first + tl.arange(0, K)
        live = row < stop
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(token + row, mask=live, other=0)
        p = tl.load(a + source[:, None] * m + left[None, :], mask=live[:, None] & (left < m)[None, :], other=0.0)
        place = row[:, None].to(tl.int64) * n + right[None, :]
        q = tl.load(b + place, mask=live[:, None] & (right < n)[None, :], other=0.0)
        acc = tl.dot(tl.trans(p), q, acc)
    inside = (left < m)[:, None] & (right < n)[None, :]
    here = total + expert.to(tl.int64) * m * n + left[:, None].to(tl.int64) * n + right[None, :]
    acc += tl.load(here, mask=inside, other=0.0)
    tl.store(here, acc, mask=inside)


def add_products(total: Tensor, a: Tensor, b: Tensor, offsets: Tensor, token: Tensor | None = None) -> None:
    """total [E, m, n] float32 += a_e^T b_e; a [R, m], b [R, n] contiguous bfloat16.

    token [R] int64: a is [N, m], and its row of row r is token[r].
    """
    high, wide, depth, stages = GRAM
    m, n = a.shape[1], b.shape[1]
    grid = (triton.cdiv(m, high) * triton.cdiv(n, wide), len(offsets) - 1)
    launch: Any = _product_kernel[grid]  # type: ignore[reportIndexIssue]
    launch(
        a,
        offsets if token is None else token,
        b,
        offsets,
        total,
        m,
        n,
        INDEXED=token is not None,
        M=high,
        N=wide,
        K=depth,
        num_warps=8,
        num_stages=stages,
    )


@triton.jit
def _mirror_kernel(total, n, T: tl.constexpr):
    i, j = tl.program_id(0), tl.program_id(1)
    if j <= i:
        base = total + tl.program_id(2).to(tl.int64) * n * n
        row, column = i * T + tl.arange(0, T), j * T + tl.arange(0, T)
        below = (row < n)[:, None] & (row[:, None] > column[None, :])
        values = tl.load(base + row[:, None].to(tl.int64) * n + column[None, :], mask=below, other=0.0)
        above = (row < n)[None, :] & (column[:, None] < row[None, :])
        tl.store(base + column[:, None].to(tl.int64) * n + row[None, :], tl.trans(values), mask=above)


def mirror(total: Tensor) -> None:
    """Copy the lower triangles of total [E, n, n] above the diagonal."""
    tiles = triton.cdiv(total.shape[1], 64)
    launch: Any = _mirror_kernel[(tiles, tiles, total.shape[0])]  # type: ignore[reportIndexIssue]
    launch(total, total.shape[1], T=64, num_warps=8)


@triton.jit
def _norm_kernel(y, out, n, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((C,), tl.float32)
    for first in range(0, n, C):
        column = first + tl.arange(0, C)
        value = tl.load(y + row * n + column, mask=column < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + row, tl.sqrt(tl.sum(total, 0)))


def row_norms(y: Tensor) -> Tensor:
    """Euclidean length [R] float32 of rows y [R, n]."""
    out = torch.empty(len(y), dtype=torch.float32, device=y.device)
    if len(y):
        _norm_kernel[(len(y),)](y.contiguous(), out, y.shape[1], C=1024, num_warps=4)
    return out


@triton.jit
def _abs_max_kernel(x, out, rows, n, R: tl.constexpr, C: tl.constexpr):
    part, column = tl.program_id(1), tl.program_id(0) * C + tl.arange(0, C)
    inside = column < n
    abs_max = tl.zeros((C,), tl.float32)
    for step in range(R):
        row = tl.minimum(part.to(tl.int64) * R + step, rows - 1)
        size = tl.abs(tl.load(x + row * n + column, mask=inside, other=0.0).to(tl.float32))
        abs_max = tl.maximum(abs_max, tl.where(size < float("inf"), size, float("inf")))  # NaN compares false
    tl.store(out + part.to(tl.int64) * n + column, abs_max, mask=inside)


def column_abs_max(x: Tensor) -> Tensor:
    """Largest magnitude [n] float32 of each column of x [R, n]; infinity where one is not finite."""
    rows, n = x.shape
    out = torch.zeros(max(1, -(-rows // ABS_MAX_ROWS)), n, dtype=torch.float32, device=x.device)
    if rows:
        grid = (-(-n // 512), len(out))
        _abs_max_kernel[grid](x.contiguous(), out, rows, n, R=ABS_MAX_ROWS, C=512, num_warps=4)
    return out.amax(0)
