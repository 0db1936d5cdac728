"""Errors of all codebook points at many scales on the CPU (numba), exhaustively.

Sixteen groups of 4 or 8 weights lie side by side in vectors (`simd/vectors.py`). At one scale s a weight x at
level c costs v (v w - a) with v = s c, a = 2 w |x| (the constant w x^2 is left out); tables hold these costs for the
halves of points (`halves.py`), and each point of the codebook costs one look-up and one minimum. Four searches
(chains) run together and share what is read. Where the number of minus signs must be even but is odd, a second variant
turns the cheapest sign, at the price 2 min_i(a_i v_i): a minimum over halves again. The points of IQ1 are signed and
shifted by +-delta, the variants.

numba's cache of compiled functions looks at a function's own file only: touch the users after a change here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from ...simd.memory import load, store
from ...simd.vectors import filled, smaller, where

if TYPE_CHECKING:
    from ...simd.typed import Floats, Integers, Number, Vector
    from .halves import Book

HUGE, ZERO, ONE, TWO = np.float32(3e38), np.float32(0), np.float32(1), np.float32(2)
FREE, PARITY, DELTA_EACH, DELTA_SHARED = range(4)
CHAINS = 4
LANES = (0,) * 16  # groups side by side
WIDTH = len(LANES)
ROW = CHAINS * WIDTH  # a row of a table: one part or half, all chains
_jit = numba.njit(cache=True, fastmath=True, nogil=True)


@numba.njit(cache=True, nogil=True)
def aligned(size: int):
    """Zeroed float32 [size] on a line of the cache: a vector in two lines takes twice as long to load."""
    room = np.zeros(size + WIDTH, np.float32)
    skip = (-(room.ctypes.data // 4)) % WIDTH
    return room[skip : skip + size]


@numba.njit(cache=True, nogil=True)
def room_for(book: Book):
    """Tables for `sweep`: of parts, and of second halves."""
    return aligned(4 * book.parts.shape[0] * ROW), aligned(book.inner.shape[0] * ROW)


@_jit
def _price(
    a: Floats, w: Floats, g: int, s: Vector, shift: Number, turning: bool, values: Floats, chain: int, parts: Floats
):
    """One chain's costs of all parts in each quarter of a group; `turning`: what turning the cheapest sign adds."""
    count, width = values.shape
    for q in range(4):
        for p in range(count):
            total = filled(HUGE if turning else ZERO, LANES)
            for i in range(width):
                at, v = ((g * 4 + q) * width + i) * WIDTH, s * (values[p, i] + shift)
                if turning:
                    total = smaller(total, TWO * (v * load(a, at, LANES)))
                else:
                    total = total + v * (v * load(w, at, LANES) - load(a, at, LANES))
            store(parts, ((q * count + p) * CHAINS + chain) * WIDTH, total)


@_jit
def _join(parts: Floats, first: int, second: int, turning: bool):
    """Costs of the half of two parts, four chains; `turning`: of the odd chains what turning a sign adds."""
    c0 = load(parts, first, LANES) + load(parts, second, LANES)
    c2 = load(parts, first + 2 * WIDTH, LANES) + load(parts, second + 2 * WIDTH, LANES)
    a1, b1 = load(parts, first + WIDTH, LANES), load(parts, second + WIDTH, LANES)
    a3, b3 = load(parts, first + 3 * WIDTH, LANES), load(parts, second + 3 * WIDTH, LANES)
    if turning:
        return c0, smaller(a1, b1), c2, smaller(a3, b3)
    return c0, a1 + b1, c2, a3 + b3


@_jit
def _store_four(out: Floats | Integers, at: int, first: Vector, second: Vector, third: Vector, fourth: Vector):
    store(out, at, first)
    store(out, at + WIDTH, second)
    store(out, at + 2 * WIDTH, third)
    store(out, at + 3 * WIDTH, fourth)


@_jit
def _halve(inner: Integers, turning: bool, parts: Floats, halves: Floats):
    """Costs of all second halves; in the odd chains with a sign turned, if that is what they are for."""
    count = parts.size // (4 * ROW)
    for j in range(inner.shape[0]):
        c0, c1, c2, c3 = _join(parts, (2 * count + inner[j, 0]) * ROW, (3 * count + inner[j, 1]) * ROW, turning)
        if turning:
            c1, c3 = c0 + c1, c2 + c3
        _store_four(halves, j * ROW, c0, c1, c2, c3)


@_jit
def _walk(
    outer: Integers,
    start: Integers,
    mate: Integers,
    turning: bool,
    parts: Floats,
    halves: Floats,
    least: Floats,
    place: Integers,
    at: int,
):
    """Least cost of all points and the first half of the cheapest, from the tables; outputs at `at`."""
    count = parts.size // (4 * ROW)
    e0 = e1 = e2 = e3 = filled(HUGE, LANES)
    i0 = i1 = i2 = i3 = filled(ZERO, LANES)
    for i in range(outer.shape[0]):
        m0 = m1 = m2 = m3 = filled(HUGE, LANES)
        for n in range(start[i], start[i + 1]):
            j = mate[n] * ROW
            m0, m1 = smaller(m0, load(halves, j, LANES)), smaller(m1, load(halves, j + WIDTH, LANES))
            m2, m3 = smaller(m2, load(halves, j + 2 * WIDTH, LANES)), smaller(m3, load(halves, j + 3 * WIDTH, LANES))
        c0, c1, c2, c3 = _join(parts, outer[i, 0] * ROW, (count + outer[i, 1]) * ROW, turning)
        if turning:  # the sign is turned in the first half, or in the second
            m1, m3 = c0 + smaller(c1 + m0, m1), c2 + smaller(c3 + m2, m3)
        else:
            m1, m3 = c1 + m1, c3 + m3
        m0, m2, number = c0 + m0, c2 + m2, np.float32(i)
        i0, i1 = where(m0 < e0, number, i0), where(m1 < e1, number, i1)
        i2, i3 = where(m2 < e2, number, i2), where(m3 < e3, number, i3)
        e0, e1, e2, e3 = smaller(e0, m0), smaller(e1, m1), smaller(e2, m2), smaller(e3, m3)
    _store_four(least, at, e0, e1, e2, e3)
    _store_four(place, at, i0, i1, i2, i3)


@_jit
def sweep(
    a: Floats,
    w: Floats,
    scales: Floats,
    book: Book,
    rule: int,
    delta: Number,
    tables: tuple[Floats, Floats],
    least: Floats,
    place: Integers,
):
    """Least error of all points for each scale, group and variant, and the first half of the point that has it.

    a, w as laid; scales [S, 16]; least, place [S, groups, variants, 16], of a size that is a multiple of 64
    """
    steps, groups, variants, _ = least.shape
    parts, halves = tables
    values, outer, inner, start, mate = book.parts, book.outer, book.inner, book.start, book.mate
    turning = rule == PARITY
    for first in range(0, steps * groups * variants, CHAINS):
        for chain in range(CHAINS):
            g, variant = divmod(first + chain, variants)
            s, g = load(scales, g // groups * WIDTH, LANES), g % groups
            _price(a, w, g, s, delta if variant == 0 else -delta, turning and variant == 1, values, chain, parts)
        _halve(inner, turning, parts, halves)
        _walk(outer, start, mate, turning, parts, halves, least, place, first * WIDTH)


@_jit
def loose(a: Floats, w: Floats, scales: Floats, book: Book, delta: Number, least: Floats):
    """As `sweep` if every vector of the codebook's levels were a point: not exact, and cheap. Not for PARITY."""
    steps, groups, variants, _ = least.shape
    group = book.points.shape[1]
    for k in range(steps):
        s = load(scales, k * WIDTH, LANES)
        for variant in range(variants):
            shift = delta if variant == 0 else -delta
            for g in range(groups):
                total = filled(ZERO, LANES)
                for at in range(g * group * WIDTH, (g + 1) * group * WIDTH, WIDTH):
                    weight, pull, best = load(w, at, LANES), load(a, at, LANES), filled(HUGE, LANES)
                    for n in range(book.levels.size):
                        v = s * (book.levels[n] + shift)
                        best = smaller(best, v * (v * weight - pull))
                    total = total + best
                store(least, ((k * groups + g) * variants + variant) * WIDTH, total)


@_jit
def settle(least: Floats, odd: Floats, rule: int, errors: Floats, second: Integers):
    """Errors [S, 16] of blocks under the rule, and the groups that take the second variant: second [S, groups, 16]."""
    steps, groups, variants, _ = least.shape
    for k in range(steps):
        total, other, nothing = filled(ZERO, LANES), filled(ZERO, LANES), filled(ZERO, LANES)
        if rule == PARITY and odd.shape[0] < groups:
            total = _settle_pairs(least, odd, k, second)
        else:
            for g in range(groups):
                at = (k * groups + g) * WIDTH
                here = load(least, at * variants, LANES)
                if rule == FREE:
                    total = total + here
                    continue
                there = load(least, at * variants + WIDTH, LANES)
                if rule == DELTA_SHARED:
                    total, other = total + here, other + there
                    continue
                taken = load(odd, g * WIDTH, LANES) > ZERO if rule == PARITY else there < here
                total = total + where(taken, there, here)
                store(second, at, where(taken, ONE, nothing))
        if rule == DELTA_SHARED:
            for g in range(groups):
                store(second, (k * groups + g) * WIDTH, where(other < total, ONE, nothing))
            total = smaller(total, other)
        store(errors, k * WIDTH, total)


@_jit
def _settle_pairs(least: Floats, odd: Floats, k: int, second: Integers):
    """One scale of IQ3_XXS: two points share one parity; the turned sign is in one of them."""
    groups, total, nothing = least.shape[1], filled(ZERO, LANES), filled(ZERO, LANES)
    for g in range(0, groups, 2):
        at, octet = (k * groups + g) * WIDTH, load(odd, g // 2 * WIDTH, LANES) > ZERO
        plain, turned = load(least, 2 * at, LANES), load(least, 2 * at + WIDTH, LANES)
        plain_next, turned_next = load(least, 2 * at + 2 * WIDTH, LANES), load(least, 2 * at + 3 * WIDTH, LANES)
        here, there = turned + plain_next, plain + turned_next
        total = total + where(octet, smaller(here, there), plain + plain_next)
        store(second, at, where(octet & (here <= there), ONE, nothing))
        store(second, at + WIDTH, where(octet & (there < here), ONE, nothing))
    return total
