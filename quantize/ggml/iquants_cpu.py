"""The whole encoder of the I-quants for one super-block after another on CPU (numba).

It does what `iquants.search_tensors` does, step by step, on as many super-blocks as fill the lanes. It may guess scales
from the errors that all vectors of the codebook's levels would have; levels and points are still the best ones.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from .iquants_numba import lay, points_of, scratch, sign_bytes
from .iquants_sweep import CHAINS, DELTA_EACH, WIDTH, loose, room_for, settle, sweep

LARGEST = 65504.0


@numba.njit(cache=True, nogil=True)
def half(value):  # type: ignore[no-untyped-def]
    """The nearest fp16 to a value >= 0, ties to even, as float."""
    if value >= LARGEST:
        return LARGEST
    if value < 2.0**-14:
        return np.rint(value * 2.0**24) * 2.0**-24
    mantissa, exponent = math.frexp(value)
    return math.ldexp(np.rint(mantissa * 2048.0), exponent - 11)


@numba.njit(cache=True, nogil=True)
def _guess(errors, reference, fan, spread, offset, step, top, level):  # type: ignore[no-untyped-def]
    """Scale and levels from the error curves [S, blocks]: the super-scale of `spread` at which they lose least."""
    blocks = reference.size
    best = np.empty(blocks, np.float32)
    for b in range(blocks):
        best[b] = reference[b] * fan[np.argmin(errors[:, b])]
    largest = best.max() / (offset + step * top)
    width, last = fan[1] - fan[0], fan.size - 1.001
    lowest, winner, trial = np.float32(np.inf), np.float32(0), np.zeros(blocks, np.int64)
    for m in range(spread.size):
        scale, total = largest * spread[m], np.float32(0)
        for b in range(blocks):
            wanted = (best[b] / max(scale, np.float32(1e-30)) - offset) / step
            trial[b] = min(max(int(np.rint(wanted)), 0), top)
            ratio = scale * (offset + step * trial[b]) / max(reference[b], np.float32(1e-30))
            place = min(max((ratio - fan[0]) / width, 0.0), last)
            left = int(place)
            total += errors[left, b] + (errors[left + 1, b] - errors[left, b]) * (place - left)
        if total < lowest:
            lowest, winner = total, scale
            level[:] = trial
    return winner


@numba.njit(cache=True, fastmath=True, nogil=True)
def _refit(x, w, points, factor, delta, code, signs, minus):  # type: ignore[no-untyped-def]
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
    return pull / max(square, np.float32(1e-30))


@numba.njit(cache=True, nogil=True)
def _fan_out(x, largest, fan, reference, scales):  # type: ignore[no-untyped-def]
    """Scales [S, 16] to try in each block of x, and what they are relative to."""
    for lane in range(x.shape[0]):
        reference[lane] = np.abs(x[lane]).max() / largest
        scales[:, lane] = reference[lane] * fan


@numba.njit(cache=True, nogil=True)
def _step_around(scale, level, near, offset, step, top, tried, scales):  # type: ignore[no-untyped-def]
    """Levels [K, blocks] of one super-block to try, `near` its present ones, and the scales that they make."""
    for k in range(tried.shape[0]):
        for b in range(level.size):
            tried[k, b] = min(max(level[b] + min(k, 2 * near) - near, 0), top)
            scales[k, b] = scale * (offset + step * tried[k, b])


@numba.njit(cache=True, nogil=True)
def _take_best(errors, tried, scales, best, level, scale):  # type: ignore[no-untyped-def]
    """The tried scale with the least error in each lane: its number, its level, itself."""
    for lane in range(level.size):
        k = np.argmin(errors[:, lane])
        best[lane], level[lane], scale[lane] = k, tried[k, lane], scales[k, lane]


@numba.njit(cache=True, nogil=True)
def encode(  # type: ignore[no-untyped-def]
    x, w, unit, book, rule, delta, offset, step, levels, fan, spread, near, rounds, guessing,
    out_scale, out_level, out_code, out_signs, out_minus,
):  # fmt: skip
    """Fields of N super-blocks of B blocks.

    x, w [N * B, shared] and unit [N] as in `iquants.Scaled`; fan [S], S a multiple of four; spread [M]
    guessing: by `loose`
    out_scale [N] float32 (an fp16 number), level [N * B], code [N * B, groups], signs and minus [N * B, octets]
    """
    (count, shared), group, blocks = x.shape, book.points.shape[1], x.shape[0] // unit.size
    a, weight, odd, least, place, errors, second = scratch(shared, group, rule, fan.size)
    tables, taken, tries = room_for(book), np.zeros((WIDTH, shared // group), np.bool_), 2 * near + 1
    if least[0].size % (CHAINS * WIDTH):
        tries += -tries % CHAINS
    wide, reference = np.zeros((fan.size, WIDTH), np.float32), np.zeros(WIDTH, np.float32)
    narrow, tried = np.zeros((tries, WIDTH), np.float32), np.zeros((tries, WIDTH), np.int64)
    level, best, chosen = np.zeros(WIDTH, np.int64), np.zeros(WIDTH, np.int64), np.zeros(WIDTH, np.float32)
    for start in range(0, count, WIDTH):
        of = slice(start, min(start + WIDTH, count))
        xs, ws, code, signs, minus = x[of], w[of], out_code[of], out_signs[of], out_minus[of]
        lay(xs, ws, rule, a, weight, odd)
        _fan_out(xs, book.points.max(), fan, reference, wide)
        if guessing:
            loose(a, weight, wide, book, rule, delta, least)
        else:
            sweep(a, weight, wide, book, rule, delta, tables, least, place)
        settle(least, odd, rule, errors, second)
        for turn in range(rounds):
            for first in range(0, len(xs), blocks):
                n, part = (start + first) // blocks, slice(first, first + blocks)
                if turn:
                    factor = (offset + step * level[part]).astype(np.float32)
                    scale = _refit(xs[part], ws[part], book.points, factor, delta, code[part], signs[part], minus[part])
                else:
                    scale = _guess(errors[:, part], reference[part], fan, spread, offset, step, levels - 1, level[part])
                out_scale[n] = half(scale * unit[n])
                scale = np.float32(out_scale[n] / unit[n])
                _step_around(scale, level[part], near, offset, step, levels - 1, tried[:, part], narrow[:, part])
            sweep(a, weight, narrow, book, rule, delta, tables, least[:tries], place[:tries])
            settle(least[:tries], odd, rule, errors[:tries], second[:tries])
            _take_best(errors[:tries], tried, narrow, best, level, chosen)
            points_of(a, weight, chosen, best, book, rule, delta, place, second, code, taken)
            if rule >= DELTA_EACH:
                minus[:] = taken[: len(xs)]
            else:
                sign_bytes(xs, ws, book.points, code, taken, signs)
        out_level[of] = level[: len(xs)]
