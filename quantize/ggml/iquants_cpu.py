"""The whole encoder of the I-quants for one super-block after another on CPU (numba).

It does what `iquants.search_tensors` does, step by step, but forms the products of a super-block with the codebook
once: they stay in the cache for every scale that is tried, the refit and the choice of points. The short way guesses
IQ1's scales from the errors that all vectors of -1, 0 and 1 would have; levels and points are still the best ones.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from .iquants_numba import (
    DELTA_EACH,
    PAD,
    PARITY,
    _errors,
    _pick,
    _pick_paired,
    _pick_shifted,
    _prepare,
    _sign_bytes,
    _unbound,
)

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
    """Scale and levels from the error curves [blocks, S]: the super-scale of `spread` at which they lose least."""
    blocks = reference.size
    best = np.empty(blocks, np.float32)
    for b in range(blocks):
        best[b] = reference[b] * fan[np.argmin(errors[b])]
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
            total += errors[b, left] + (errors[b, left + 1] - errors[b, left]) * (place - left)
        if total < lowest:
            lowest, winner = total, scale
            level[:] = trial
    return winner


@numba.njit(cache=True, nogil=True)
def _refit(x, w, points, shared, offset, step, delta, level, code, signs, minus):  # type: ignore[no-untyped-def]
    """Least-squares scale of one super-block for its points; x, w [256]."""
    group, pull, square = points.shape[0], np.float32(0), np.float32(0)
    for i in range(x.size):
        value = points[i % group, code[i // group]]
        if delta > 0:
            value += -delta if minus[i // 8] else delta
        elif signs[i // 8] >> (i % 8) & 1:
            value = -value
        value *= offset + step * level[i // shared]
        pull += w[i] * x[i] * value
        square += w[i] * value * value
    return pull / max(square, np.float32(1e-30))


@numba.njit(cache=True, nogil=True)
def encode(  # type: ignore[no-untyped-def]
    x, w, unit, points, rule, delta, shared, offset, step, levels, fan, spread, near, rounds, short,
    out_scale, out_level, out_code, out_signs, out_minus,
):  # fmt: skip
    """Fields of N super-blocks.

    x, w [N, 256] and unit [N] as in `iquants.Scaled`; fan [S], S a multiple of four; spread [M]
    short: the short way
    out_scale [N] float32 (an fp16 number), level [N, blocks], code [N, groups], signs and minus [N, 32]
    """
    group, entries = points.shape[0], points.shape[1] - PAD
    blocks, per = 256 // shared, shared // group
    a, weight = np.zeros((blocks * per, group), np.float32), np.zeros((blocks * per, group), np.float32)
    p, q = np.empty((blocks * per, entries), np.float32), np.empty((blocks * per, entries), np.float32)
    other = np.empty((blocks * per, entries), np.float32)
    tilt, odd = np.zeros(blocks * per, np.float32), np.zeros(blocks * per, np.bool_)
    errors, reference = np.empty((blocks, fan.size), np.float32), np.empty(blocks, np.float32)
    count = 2 * near + 1
    tried, scales = np.empty(count + -count % 4, np.int64), np.empty(count + -count % 4, np.float32)
    wide, narrow = np.zeros((2, fan.size), np.float32), np.zeros((2, scales.size), np.float32)
    found, flag = np.empty(scales.size, np.float32), np.zeros(per, np.bool_)
    level, top = np.zeros(blocks, np.int64), levels - 1
    largest = points.max()
    for n in range(x.shape[0]):
        _prepare(x[n], w[n], points, rule, delta, a, weight, p, q, other, tilt, odd)
        for b in range(blocks):
            part, of = slice(b * shared, (b + 1) * shared), slice(b * per, (b + 1) * per)
            reference[b] = np.abs(x[n, part]).max() / largest
            if short and rule >= DELTA_EACH:
                _unbound(x[n, part], w[n, part], rule, delta, reference[b] * fan, errors[b])
            else:
                ratio = reference[b] * fan
                _errors(p[of], q[of], other[of], tilt[of], odd[of], group, rule, ratio, wide, errors[b])
        scale = _guess(errors, reference, fan, spread, offset, step, top, level)
        for turn in range(rounds):
            if turn:
                shift = delta if rule >= DELTA_EACH else np.float32(0)
                scale = _refit(
                    x[n], w[n], points, shared, offset, step, shift, level, out_code[n], out_signs[n], out_minus[n]
                )
            out_scale[n] = half(scale * unit[n])
            scale = np.float32(out_scale[n] / unit[n])
            for b in range(blocks):
                of = slice(b * per, (b + 1) * per)
                for k in range(tried.size):
                    tried[k] = min(max(level[b] + min(k, count - 1) - near, 0), top)
                    scales[k] = scale * (offset + step * tried[k])
                _errors(p[of], q[of], other[of], tilt[of], odd[of], group, rule, scales, narrow, found)
                best = np.argmin(found)
                level[b] = tried[best]
                code, octets = out_code[n, of], slice(b * shared // 8, (b + 1) * shared // 8)
                if rule >= DELTA_EACH:
                    minus = out_minus[n, octets]
                    _pick_shifted(p[of], q[of], other[of], tilt[of], rule, scales[best], code, minus)
                    continue
                if rule == PARITY and group == 4:
                    _pick_paired(p[of], q[of], other[of], odd[of], scales[best], code, flag)
                else:
                    _pick(p[of], q[of], other[of], odd[of], rule, scales[best], code, flag)
                _sign_bytes(x[n, b * shared : (b + 1) * shared], a[of], points, code, flag, out_signs[n, octets])
        out_level[n] = level
