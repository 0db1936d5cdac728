"""`encode_super_blocks` on the CPU (numba), one super-block after another.

It does what `encode.search_tensors` does, step by step, on as many super-blocks as fill the lanes. It may guess scales
from the errors that all vectors of the codebook's levels would have; levels and points are still the best ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba
import numpy as np

from ...overflow import FP16_MAX
from ...simd.memory import load, store
from ...simd.vectors import filled, larger, nearest_whole, smaller, where
from .search_cpu import lay, points_of, scratch, sign_bytes
from .sweep_cpu import CHAINS, DELTA_EACH, HUGE, LANES, ONE, WIDTH, ZERO, loose, room_for, settle, sweep

if TYPE_CHECKING:
    from ...simd.typed import Bits, Flags, Floats, Integers, Number, Vector
    from .halves import Book

TINY = np.float32(1e-30)
_jit = numba.njit(cache=True, fastmath=True, nogil=True)


@numba.njit(cache=True, nogil=True)
def half(value: Number):
    """The nearest fp16 to a value >= 0, ties to even, as float."""
    if value >= FP16_MAX:
        return FP16_MAX
    if value < 2.0**-14:
        return np.rint(value * 2.0**24) * 2.0**-24
    mantissa, exponent = math.frexp(value)
    return math.ldexp(np.rint(mantissa * 2048.0), exponent - 11)


@_jit
def _levels(target: Vector, unit: Vector, offset: Number, step: Number, top: Number):
    """The levels at which `unit` comes nearest to the wanted scales of blocks; lanes."""
    level = nearest_whole((target / larger(unit, TINY) - offset) / step)
    return smaller(larger(level, ZERO), top)


@_jit
def _losses(
    errors: Floats,
    reference: Vector,
    target: Vector,
    unit: Vector,
    fan: Floats,
    offset: Number,
    step: Number,
    top: Number,
):
    """Errors of blocks at the levels nearest to the wanted scales, linear between those that were tried; lanes."""
    scale = unit * (offset + step * _levels(target, unit, offset, step, top))
    place = (scale / larger(reference, TINY) - fan[0]) / (fan[1] - fan[0])
    place, total = smaller(larger(place, ZERO), np.float32(fan.size - 1)), ZERO * unit
    for k in range(fan.size):
        total = total + larger(ONE - abs(place - np.float32(k)), ZERO) * load(errors, k * WIDTH, LANES)
    return total


@_jit
def _guess(
    errors: Floats,
    reference: Floats,
    fan: Floats,
    spread: Floats,
    offset: Number,
    step: Number,
    top: Number,
    blocks: int,
    scale: Floats,
    level: Floats,
):
    """Scale [supers] and levels [16] from error curves [S, 16]: the super-scales of `spread` that lose least."""
    relative, least = filled(ZERO, LANES), filled(HUGE, LANES)
    for k in range(fan.size):
        error = load(errors, k * WIDTH, LANES)
        relative, least = where(error < least, fan[k], relative), smaller(least, error)
    target, unit, losses = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    ours = load(reference, 0, LANES)
    store(target, 0, relative * ours)
    lowest = np.full(scale.size, HUGE)
    for m in range(spread.size):
        for n in range(scale.size):
            of = slice(n * blocks, (n + 1) * blocks)
            unit[of] = target[of].max() / (offset + step * top) * spread[m]
        store(losses, 0, _losses(errors, ours, relative * ours, load(unit, 0, LANES), fan, offset, step, top))
        for n in range(scale.size):
            loss = losses[n * blocks : (n + 1) * blocks].sum()
            if loss < lowest[n]:
                lowest[n], scale[n] = loss, unit[n * blocks]
    for n in range(scale.size):
        unit[n * blocks : (n + 1) * blocks] = scale[n]
    store(level, 0, _levels(relative * ours, load(unit, 0, LANES), offset, step, top))


@_jit
def _refit(
    x: Floats, w: Floats, points: Floats, factor: Floats, delta: Number, code: Integers, signs: Bits, minus: Flags
):
    """Least-squares scale of one super-block for its points; x, w [blocks, shared], factor [blocks] of the scale."""
    group, pull, square = points.shape[1], np.float32(0), np.float32(0)
    for b in range(x.shape[0]):
        one, bend = np.float32(0), np.float32(0)
        for g in range(code.shape[1]):
            for c in range(group):
                i = g * group + c
                value = points[code[b, g], c] + (-delta if minus[b, i // 8] else delta)
                value = -value if signs[b, i // 8] >> (i % 8) & 1 else value
                one += w[b, i] * x[b, i] * value
                bend += w[b, i] * value * value
        pull += factor[b] * one
        square += factor[b] * factor[b] * bend
    return pull / max(square, TINY)


@_jit
def _fan_out(x: Floats, largest: Number, fan: Floats, reference: Floats, scales: Floats):
    """Scales [S, 16] to try in each block of x, and what they are relative to."""
    for lane in range(x.shape[0]):
        peak = ZERO
        for i in range(x.shape[1]):
            peak = max(peak, abs(x[lane, i]))
        reference[lane] = peak / largest
        for k in range(fan.size):
            scales[k, lane] = reference[lane] * fan[k]


@_jit
def _step_around(
    unit: Floats, level: Floats, near: int, offset: Number, step: Number, top: Number, tried: Floats, scales: Floats
):
    """Levels [K, 16] to try, `near` the present ones, and the scales that they make of the super-scales."""
    now, times = load(level, 0, LANES), load(unit, 0, LANES)
    for k in range(tried.shape[0]):
        new = smaller(larger(now + np.float32(min(k, 2 * near) - near), ZERO), top)
        store(tried, k * WIDTH, new)
        store(scales, k * WIDTH, times * (offset + step * new))


@_jit
def _take_best(errors: Floats, tried: Floats, scales: Floats, best: Integers, level: Floats, scale: Floats):
    """The tried scale with the least error in each lane: its number, its level, itself."""
    least, number, new, own = filled(HUGE, LANES), filled(ZERO, LANES), filled(ZERO, LANES), filled(ZERO, LANES)
    for k in range(tried.shape[0]):
        error, at = load(errors, k * WIDTH, LANES), k * WIDTH
        lower = error < least
        least, number = where(lower, error, least), where(lower, np.float32(k), number)
        new, own = where(lower, load(tried, at, LANES), new), where(lower, load(scales, at, LANES), own)
    store(best, 0, number)
    store(level, 0, new)
    store(scale, 0, own)


@numba.njit(cache=True, nogil=True)
def encode_super_blocks(
    x: Floats,
    w: Floats,
    unit: Floats,
    book: Book,
    rule: int,
    delta: Number,
    offset: Number,
    step: Number,
    levels: int,
    fan: Floats,
    spread: Floats,
    near: int,
    rounds: int,
    guessing: bool,
    out_scale: Floats,
    out_level: Integers,
    out_code: Integers,
    out_signs: Bits,
    out_minus: Flags,
):
    """Fields of N super-blocks of B blocks.

    x, w [N * B, shared] and unit [N] as in `encode.Scaled`; fan [S], S a multiple of four; spread [M]
    guessing: scales by `loose`, not with PARITY
    out_scale [N] float32 (an fp16 number), level [N * B], code [N * B, groups], signs and minus [N * B, octets]
    """
    (count, shared), group, blocks = x.shape, book.points.shape[1], x.shape[0] // unit.size
    a, weight, odd, least, place, errors, second = scratch(shared, group, rule, fan.size)
    tables, taken, tries = room_for(book), np.zeros((WIDTH, shared // group), np.bool_), 2 * near + 1
    if least[0].size % (CHAINS * WIDTH):
        tries += -tries % CHAINS
    wide, reference = np.zeros((fan.size, WIDTH), np.float32), np.zeros(WIDTH, np.float32)
    narrow, tried = np.zeros((tries, WIDTH), np.float32), np.zeros((tries, WIDTH), np.float32)
    level, best, chosen = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.int16), np.zeros(WIDTH, np.float32)
    scales, stored = np.zeros(WIDTH // blocks, np.float32), np.zeros(WIDTH, np.float32)
    top, largest = np.float32(levels - 1), book.levels[-1]
    for start in range(0, count, WIDTH):
        of = slice(start, min(start + WIDTH, count))
        xs, ws, code, signs, minus = x[of], w[of], out_code[of], out_signs[of], out_minus[of]
        lay(xs, ws, rule, a, weight, odd)
        _fan_out(xs, largest, fan, reference, wide)
        if guessing:
            loose(a, weight, wide, book, delta, least)
        else:
            sweep(a, weight, wide, book, rule, delta, tables, least, place)
        settle(least, odd, rule, errors, second)
        supers = len(xs) // blocks
        _guess(errors, reference, fan, spread, offset, step, top, blocks, scales[:supers], level)
        for turn in range(rounds):
            for first in range(0, len(xs), blocks):
                n, part = first // blocks, slice(first, first + blocks)
                if turn:
                    factor = offset + step * level[part]
                    scales[n] = _refit(
                        xs[part], ws[part], book.points, factor, delta, code[part], signs[part], minus[part]
                    )
                at = start // blocks + n
                out_scale[at] = half(scales[n] * unit[at])  # pyright: ignore[reportArgumentType]
                stored[part] = out_scale[at] / unit[at]
            _step_around(stored, level, near, offset, step, top, tried, narrow)
            sweep(a, weight, narrow, book, rule, delta, tables, least[:tries], place[:tries])
            settle(least[:tries], odd, rule, errors[:tries], second[:tries])
            _take_best(errors[:tries], tried, narrow, best, level, chosen)
            points_of(a, weight, chosen, best, book, rule, delta, place, second, code, taken)
            if rule >= DELTA_EACH:
                minus[:] = taken[: len(xs)]
            else:
                sign_bytes(xs, ws, book.points, code, taken, signs)
        out_level[of] = level[: len(xs)]
