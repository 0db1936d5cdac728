"""`mxfp4` on the CPU (numba): the best of three exponents, sixteen blocks side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from torch import Tensor

from ...simd.memory import load, store
from ...simd.tiles import LANES, in_threads, inline, places, turned
from ...simd.vectors import e2m1, exponent, filled, larger, power, smaller, where
from .weighted import Weighted

if TYPE_CHECKING:
    from ...simd.typed import Bits, Floats, Lanes, Number, Vector

_CHUNK = 1 << 13  # blocks of one call
ZERO, ONE, TWO, FOUR = np.float32(0), np.float32(1), np.float32(2), np.float32(4)
HALF, QUARTER, SEVEN = np.float32(0.5), np.float32(0.25), np.float32(7)
LARGEST = np.float32(252)
INVERSE = np.float32(255)  # 2^(e - 128) is the inverse of the float32 with the exponent's bits 255 - e


def search_exponents(blocks: Weighted, exponents: Tensor, codes: Tensor) -> None:
    """Fill the exponents uint8 [P] and codes uint8 [P, 32] of all blocks."""
    inputs = (blocks.x.numpy(), blocks.w.numpy(), blocks.per_row, blocks.share, (0,) * 32, LANES)
    out = (exponents.numpy(), codes.numpy())
    in_threads(lambda first, stop: _search(first, stop, *inputs, *out), len(blocks.x), _CHUNK)


@inline
def _largest(x: Floats, ks: Lanes, ls: Lanes):
    """The largest magnitude of x [K, L] in each lane."""
    out = abs(load(x, 0, ls))
    for k in range(1, len(ks)):
        out = larger(out, abs(load(x, k * len(ls), ls)))
    return out


@inline
def _error(x: Floats, w: Floats, ks: Lanes, ls: Lanes, inv: Vector):
    """The error of each lane at the step 1 / inv, in squares of the step."""
    out = filled(ZERO, ls)
    for k in range(len(ks)):
        y = load(x, k * len(ls), ls) * inv
        r = y - e2m1(y)
        out = out + load(w, k * len(ls), ls) * r * r
    return out


@inline
def _write(x: Floats, offset: int, ks: Lanes, inv: Number, codes: Bits):
    """The codes of the block that starts at `offset`: 7 is level 0."""
    q = e2m1(load(x, offset, ks) * inv)
    size = abs(q)
    index = smaller(size, smaller(HALF * size + TWO, QUARTER * size + FOUR))
    store(codes, offset, SEVEN + where(q < ZERO, -index, index))


@numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def _search(
    first: int,
    stop: int,
    x: Floats,
    w: Floats,
    per_row: int,
    share: int,
    ks: Lanes,
    ls: Lanes,
    exponents: Bits,
    codes: Bits,
):
    """The blocks first .. stop."""
    xt, wt = np.empty((len(ks), len(ls)), np.float32), np.empty((len(ks), len(ls)), np.float32)
    starts, other = np.empty(len(ls), np.int64), np.empty(len(ls), np.int64)
    inv, found = np.empty(len(ls), np.float32), np.empty(len(ls), np.uint8)
    for begin in range(first, stop, len(ls)):
        places(begin, stop, ks, (0,), per_row, share, starts, other)
        turned(x, starts, ks, ls, xt)
        turned(w, other, ks, ls, wt)
        # The largest magnitude comes to lie at 8 to 16 steps; the end level is 12.
        middle = smaller(larger(exponent(_largest(xt, ks, ls)) - TWO, TWO), LARGEST)
        best, best_e = _error(xt, wt, ks, ls, power(INVERSE - middle)), middle
        for move, square in ((ONE, FOUR), (-ONE, QUARTER)):
            e = middle + move
            error = _error(xt, wt, ks, ls, power(INVERSE - e)) * square
            better = error < best
            best, best_e = where(better, error, best), where(better, e, best_e)
        store(inv, 0, power(INVERSE - best_e))
        store(found, 0, best_e)
        for i in range(min(len(ls), stop - begin)):
            exponents[begin + i] = found[i]
            _write(x, starts[i], ks, inv[i], codes)
