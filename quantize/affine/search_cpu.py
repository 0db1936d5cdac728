"""The search for a group's scale and bias on the CPU (numba): sixteen output rows side by side in vectors.

A candidate's error comes from five sums over the group, of weights less the middle of their range: it differs from the
direct sum in float32's last bits, so that candidates of equal cost may be told apart otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from torch import Tensor

from ..simd.memory import load, store
from ..simd.tiles import in_threads, inline, part_of
from ..simd.vectors import added_bits, filled, larger, masked_bits, nearest_whole, smaller, where

if TYPE_CHECKING:
    from ..simd.typed import Floats, Lanes, Number, Vector

TILE = 16
LANES = (0,) * TILE
ZERO, ONE, TWO, HUGE = (np.float32(v) for v in (0, 1, 2, 3e38))
FLAT, TINY = np.float32(1e-6), np.float32(1e-38)
HALF, UPPER = np.float32(32768), np.float32(-65536)  # of the bits that bfloat16 drops: half of their unit, the mask


def search_panel(part: Tensor, importance: Tensor, bits: int, shares: list[float]) -> tuple[Tensor, Tensor]:
    """As `grid.search_panel`; shares: of the range, tried at each end."""
    experts, _, outputs = part.shape
    tiles = -(-outputs // TILE)
    scale, bias = part.new_empty(experts, outputs), part.new_empty(experts, outputs)
    given = (part.numpy(), importance.contiguous().numpy(), np.float32((1 << bits) - 1), np.array(shares, np.float32))
    out = (scale.numpy(), bias.numpy())

    def work(first: int, stop: int) -> None:
        _search(first, stop, *given, *out, LANES)

    in_threads(work, experts * tiles, part_of(experts * tiles, 1))
    return scale, bias


@inline
def _bfloat16(value: Vector):
    """The nearest bfloat16, halves away from zero."""
    return masked_bits(added_bits(value, HALF), UPPER)


@inline
def _usable(value: Vector):
    rounded = _bfloat16(value)
    return where(rounded == ZERO, ONE, rounded)


@inline
def _best(held: Floats, h: Floats, count: int, top: Number, shares: Floats, ls: Lanes):
    """Scale and bias of the rows of held [count, L]."""
    first = load(held, 0, ls)
    least, most = first, first
    for k in range(1, count):
        x = load(held, k * len(ls), ls)
        least, most = smaller(least, x), larger(most, x)
    middle, half = (least + most) * np.float32(0.5), (most - least) * np.float32(0.5)
    total = ZERO
    sx, sxx = filled(ZERO, ls), filled(ZERO, ls)
    for k in range(count):
        x = load(held, k * len(ls), ls) - middle
        total += h[k]
        sx = sx + h[k] * x
        sxx = sxx + h[k] * x * x
    best, scale, bias = filled(HUGE, ls), filled(ONE, ls), _bfloat16(middle)
    for below in shares:
        low = _bfloat16(middle - below * half)
        for above in shares:
            tried = _usable((middle + above * half - low) / top)
            inverse = ONE / tried
            sq, sqq, sqx = filled(ZERO, ls), filled(ZERO, ls), filled(ZERO, ls)
            for k in range(count):
                x = load(held, k * len(ls), ls)
                code = smaller(larger(nearest_whole((x - low) * inverse), ZERO), top)
                weighted = h[k] * code
                sq = sq + weighted
                sqq = sqq + weighted * code
                sqx = sqx + weighted * (x - middle)
            moved = low - middle
            error = sxx - TWO * (tried * sqx + moved * sx) + tried * (tried * sqq + TWO * moved * sq)
            error = error + moved * moved * total
            better = error < best
            best, scale, bias = where(better, error, best), where(better, tried, scale), where(better, low, bias)
            square, cross = sqq - sq * sq / total, sqx - sq * sx / total
            told = square > FLAT * total  # apart: equal codes have no scale
            fitted = _usable(where(told, cross / larger(square, filled(TINY, ls)), filled(ONE, ls)))
            base = _bfloat16(middle + (sx - fitted * sq) / total)
            moved = base - middle
            error = sxx - TWO * (fitted * sqx + moved * sx) + fitted * (fitted * sqq + TWO * moved * sq)
            error = error + moved * moved * total
            better = (error < best) & told
            best, scale, bias = where(better, error, best), where(better, fitted, scale), where(better, base, bias)
    return scale, bias


@numba.njit(
    "void(int64, int64, float32[:, :, :], float32[:, ::1], float32, float32[::1], float32[:, ::1], float32[:, ::1], "
    f"UniTuple(int64, {TILE}))",
    cache=True,
    fastmath=True,
    nogil=True,
    error_model="numpy",
)
def _search(
    first: int,
    stop: int,
    part: Floats,
    importance: Floats,
    top: Number,
    shares: Floats,
    scales: Floats,
    biases: Floats,
    ls: Lanes,
):
    """Tiles first .. stop of part [E, P, O], importance [E, P]; scales and biases [E, O]."""
    _, count, outputs = part.shape
    tiles = -(-outputs // TILE)
    held, out = np.zeros((count, TILE), np.float32), np.zeros((2, TILE), np.float32)
    for p in range(first, stop):
        e, start = p // tiles, p % tiles * TILE
        end = min(start + TILE, outputs)
        held[:, : end - start] = part[e, :, start:end]
        scale, bias = _best(held, importance[e], count, top, shares, ls)
        store(out, 0, scale)
        store(out, TILE, bias)
        scales[e, start:end] = out[0, : end - start]
        biases[e, start:end] = out[1, : end - start]
