"""`search_points` on the CPU (numba): blocks into vectors, and the points that a sweep found.

`search_points` has the meaning of the arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from ...simd.memory import load
from ...simd.vectors import filled, first_of, least_of, smaller, where
from .sweep_cpu import DELTA_EACH, FREE, HUGE, LANES, ONE, PARITY, TWO, WIDTH, ZERO, aligned, room_for, settle, sweep

if TYPE_CHECKING:
    from ...simd.typed import Bits, Flags, Floats, Integers, Number
    from .halves import Book

NUMBERS = np.arange(WIDTH, dtype=np.float32)
_jit = numba.njit(cache=True, fastmath=True, nogil=True)


@numba.njit(cache=True, nogil=True)
def lay(x: Floats, w: Floats, rule: int, a: Floats, weight: Floats, odd: Floats):
    """Up to sixteen blocks x, w [B, shared] into lanes: a (2wx, or 2w|x|) and weight [shared, 16], odd [octets, 16]."""
    a[:], weight[:], odd[:] = ZERO, ZERO, ZERO
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            a[i, b] = TWO * w[b, i] * (x[b, i] if rule >= DELTA_EACH else abs(x[b, i]))
            weight[i, b] = w[b, i]
            if x[b, i] < 0:
                odd[i // 8, b] = ONE - odd[i // 8, b]


@_jit
def _cheapest(
    a: Floats,
    w: Floats,
    lane: int,
    at: int,
    s: Number,
    shift: Number,
    turn_first: Number | None,
    ends: Floats,
    start: int | np.int64,
    stop: int | np.int64,
):
    """The cheapest of the points start .. stop, which share a first half, for the group from row `at` on of one lane.

    turn_first: the least price of turning a sign of the first half, where one is to be turned; else None
    """
    half, row = ends.shape
    least, found = HUGE, start
    for n in range(start, stop, WIDTH):
        cost, turn = filled(ZERO, LANES), filled(ZERO, LANES)
        if turn_first is not None:
            turn = filled(turn_first, LANES)
        for c in range(half):
            v, pull = s * (load(ends, c * row + n, LANES) + shift), a[at + half + c, lane]
            cost = cost + v * (v * w[at + half + c, lane] - pull)
            if turn_first is not None:
                turn = smaller(turn, v * pull)
        cost = where(load(NUMBERS, 0, LANES) < np.float32(stop - n), cost + TWO * turn, HUGE)
        lowest = least_of(cost)
        if lowest < least:
            least, found = lowest, n + first_of(cost == lowest)
    return found


@_jit
def points_of(
    a: Floats,
    w: Floats,
    scale: Floats,
    best: Integers,
    book: Book,
    rule: int,
    delta: Number,
    place: Integers,
    second: Integers,
    code: Integers,
    taken: Flags,
):
    """The nearest points of the blocks in the lanes at the scale [16], number best [16] of those that were swept.

    place, second from `sweep` and `settle`; code [B, groups], and whether each takes the second variant: taken
    """
    points, ends, start, row = book.points, book.ends, book.start, book.code
    half = ends.shape[0]
    for lane in range(code.shape[0]):
        k, s = best[lane], scale[lane]
        for g in range(code.shape[1]):
            other = second[k, g, lane] > 0
            taken[lane, g] = other
            outer, at = place[k, g, int(other), lane], g * 2 * half
            first, stop = np.int64(start[outer]), np.int64(start[outer + 1])
            if rule == PARITY and other:
                turn = HUGE
                for c in range(half):
                    turn = min(turn, s * points[row[first], c] * a[at + c, lane])
                found = _cheapest(a, w, lane, at, s, ZERO, turn, ends, first, stop)
            else:
                found = _cheapest(a, w, lane, at, s, -delta if other else delta, None, ends, first, stop)
            code[lane, g] = row[found]


@_jit
def sign_bytes(x: Floats, w: Floats, points: Floats, code: Integers, turned: Flags, signs: Bits):
    """Signs [B, octets] of blocks: those of x [B, shared], with the cheapest of each turned group turned."""
    group = points.shape[1]
    for b in range(x.shape[0]):
        signs[b] = 0
        for i in range(x.shape[1]):
            signs[b, i // 8] |= np.uint8((x[b, i] < 0) << (i % 8))
        for g in range(code.shape[1]):
            if turned[b, g]:
                least, place = HUGE, 0
                for i in range(group):
                    price = w[b, g * group + i] * abs(x[b, g * group + i]) * points[code[b, g], i]
                    if price < least:
                        least, place = price, g * group + i
                signs[b, place // 8] ^= np.uint8(1 << (place % 8))


@numba.njit(cache=True, nogil=True)
def scratch(shared: int, group: int, rule: int, steps: int):
    """Arrays of sixteen blocks: a, w, odd; least, place, errors and second for so many scales."""
    groups, variants = shared // group, 1 if rule == FREE else 2
    a, w = aligned(shared * WIDTH).reshape(shared, WIDTH), aligned(shared * WIDTH).reshape(shared, WIDTH)
    odd, errors = np.zeros((-(-shared // 8), WIDTH), np.float32), np.zeros((steps, WIDTH), np.float32)
    least = aligned(steps * variants * groups * WIDTH).reshape(steps, groups, variants, WIDTH)
    place, second = np.zeros(least.shape, np.int16), np.zeros((steps, groups, WIDTH), np.int16)
    return a, w, odd, least, place, errors, second


@numba.njit(cache=True, nogil=True)
def search_points(
    x: Floats,
    w: Floats,
    scales: Floats,
    book: Book,
    rule: int,
    delta: Number,
    out_errors: Floats,
    chosen: Integers,
    code: Integers,
    signs: Bits,
    minus: Flags,
):
    """Errors [B, S] of blocks x, w [B, shared] at scales [B, S], S a multiple of four.

    When `chosen` [B] is not empty also the index of the best scale, and its nearest points: code [B, groups], signs and
    minus [B, octets].
    """
    (count, shared), steps = x.shape, scales.shape[1]
    a, weight, odd, least, place, errors, second = scratch(shared, book.points.shape[1], rule, steps)
    tables, taken = room_for(book), np.zeros((WIDTH, code.shape[1]), np.bool_)
    lanes, scale, best = np.zeros((steps, WIDTH), np.float32), np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.int16)
    for start in range(0, count, WIDTH):
        stop = min(start + WIDTH, count)
        size, of = stop - start, slice(start, stop)
        lay(x[of], w[of], rule, a, weight, odd)
        lanes[:, :size] = scales[of].T
        sweep(a, weight, lanes, book, rule, delta, tables, least, place)
        settle(least, odd, rule, errors, second)
        out_errors[of] = errors.T[:size]
        if chosen.size == 0:
            continue
        for b in range(size):
            best[b] = np.argmin(errors[:, b])
            scale[b] = lanes[best[b], b]
        chosen[of] = best[:size]
        points_of(a, weight, scale, best, book, rule, delta, place, second, code[of], taken)
        if rule >= DELTA_EACH:
            minus[of] = taken[:size]
        else:
            sign_bytes(x[of], w[of], book.points, code[of], taken, signs[of])
