# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""The search of a ggml block's scales on CPU (numba), one block after the other.

1. Each sub-block: the plan's starts, each fitted by least squares to its nearest levels; the best one once more.
2. Each block: the plan's d (and dmin) with the nearest stored integers, by the curvature of each sub-block's error.
3. Levels again at exactly what is stored, integers and d (dmin) refitted to them; the best round is kept.

Levels q at a step s and minimum m leave residuals s * r. For fixed levels the error of any other step and minimum is a
quadratic form in their differences, whose coefficients are the sums of w r^2, w r, w r q, w q and w q^2 (`_sums`).
Being sums of residuals they lose nothing to cancellation, also at 8 bits. The columns of a sub-block and the sub-blocks
of a block come as lengths of tuples, `minimum` and `uneven` as types: what is compiled knows them (see `lanes`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from .effort import Plan
from .lanes import flat_sums, from_half, half_bits, misfit, scalar, span, sums, write_codes
from .weighted import Found, Weighted

_CHUNK = 1 << 18  # weights of one call
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
HUGE, TINY, FLOOR = np.float32(3e38), np.float32(1e-30), np.float32(2**-100)
SINGULAR = np.float32(1e-6)
HALF_MAX = np.float32(65504)


def search_blocks(blocks: Weighted, plan: Plan, found: Found) -> None:
    """Fill `found` for all blocks, on as many threads as torch uses."""
    form, size = plan.form, blocks.x.shape[1]
    low, high = form.steps or (0, 0)
    limits = tuple(np.float32(v) for v in (form.lowest, form.levels[-1], low, high, form.minimums or 0, form.levels[0]))
    minimum, uneven = (None if form.minimums is None else True), (None if form.uniform else (0,))
    count = max(1, _CHUNK // size)
    columns, subs = (0,) * form.sub, (0,) * (size // form.sub)
    inputs = (blocks.x.numpy(), blocks.w.numpy(), blocks.per_row, blocks.share)
    search = (columns, subs, limits, plan.tries.numpy(), plan.refits, plan.ends.numpy(), plan.rounds, minimum, uneven)
    out = (found.d.view(torch.uint16).numpy(), found.dmin.view(torch.uint16).numpy())
    out += (found.steps.numpy(), found.minimums.numpy(), found.codes.numpy())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda part: _search(*part, *inputs, *search, *out), _parts(len(blocks.x), count)))


def search_exponents(blocks: Weighted, exponents: Tensor, codes: Tensor) -> None:
    """MXFP4: fill the exponents uint8 [P] and codes uint8 [P, 32] of all blocks."""
    inputs = (blocks.x.numpy(), blocks.w.numpy(), blocks.per_row, blocks.share, (0,) * 32, (0, 0))
    out = (exponents.numpy(), codes.numpy())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda part: _exponents(*part, *inputs, *out), _parts(len(blocks.x), _CHUNK // 32)))


def _parts(total: int, count: int) -> list[tuple[int, int]]:
    return [(first, min(first + count, total)) for first in range(0, total, count)]


_low, _high, _rint = scalar("llvm.minnum", 2), scalar("llvm.maxnum", 2), scalar("llvm.rint", 1)
_jit = numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy")


@_jit
def _half(value):  # type: ignore[no-untyped-def]
    """float32 -> the nearest finite float16, as float32."""
    return from_half(half_bits(_low(_high(value, -HALF_MAX), HALF_MAX)))


@_jit
def _whole(value, low, high):  # type: ignore[no-untyped-def]
    """The nearest whole number in low .. high."""
    return _rint(_low(_high(value, low), high))


@_jit
def _sums(x, w, ks, s, m, limits, minimum, uneven):  # type: ignore[no-untyped-def]
    """Sums of w r^2, w r, w r q, w q, w q^2 for the levels q nearest at (s, m), r in units of x."""
    if s == ZERO:  # every value is -m
        rr, r1 = flat_sums(x, w, ks, m)
        return rr, r1, ZERO, ZERO, ZERO
    inv = ONE / s
    rr, r1, rq, q1, qq = sums(x, w, ks, inv, m * inv, limits[0], limits[1], minimum, uneven)
    return rr * s * s, r1 * s, rq * s, q1, qq


@_jit
def _fit(rr, r1, rq, q1, qq, w1, s, m, limits, minimum):  # type: ignore[no-untyped-def]
    """The best real (step, minimum) for the levels found at (s, m), and its error."""
    if qq <= ZERO:
        return s, m, rr
    if minimum is None:
        ds = rq / qq
        return s + ds, m, rr - ds * rq
    signed = limits[4] == ZERO
    det = qq * w1 - q1 * q1
    if det > SINGULAR * qq * w1:
        ds = (rq * w1 - r1 * q1) / det
        dm = (q1 * rq - qq * r1) / det
        if s + ds > ZERO and (signed or m + dm >= ZERO):
            return s + ds, m + dm, rr - ds * rq + dm * r1
    dm = ZERO if signed else -m
    ds = (rq + q1 * dm) / qq
    if s + ds <= ZERO:
        return s, m, rr
    return s + ds, m + dm, rr + ds * (ds * qq - TWO * rq) + dm * (TWO * r1 - TWO * ds * q1 + dm * w1)


@_jit
def _real(x, w, ks, tries, refits, limits, minimum, uneven):  # type: ignore[no-untyped-def]
    """The best real (step, minimum) of a sub-block, its levels' sums of w q and w q^2, and the sum of w."""
    signed = limits[4] == ZERO
    least, most, w1 = span(x, w, ks)
    if minimum is None:
        extent, least = (most if most >= -least else least), ZERO
    else:
        least = least if signed else _low(least, ZERO)
        extent = most - least
    best_s = best_q1 = best_qq = ZERO
    best_m = -least
    if abs(extent) < TINY:
        return best_s, best_m, best_q1, best_qq, w1
    best = HUGE
    for t in range(len(tries) + refits):
        s, m = best_s, best_m
        if t < len(tries):
            s = extent * tries[t, 0]
            m = -least - tries[t, 1] * s
            if not signed:
                m = _high(m, ZERO)
        rr, r1, rq, q1, qq = _sums(x, w, ks, s, m, limits, minimum, uneven)
        s, m, error = _fit(rr, r1, rq, q1, qq, w1, s, m, limits, minimum)
        better = error < best  # selected, not branched on: which start wins cannot be predicted
        best, best_s, best_m = (error if better else best), (s if better else best_s), (m if better else best_m)
        best_q1, best_qq = (q1 if better else best_q1), (qq if better else best_qq)
    return best_s, best_m, best_q1, best_qq, w1


@_jit
def _stored(v, curvature, ss, low, high, ends, t):  # type: ignore[no-untyped-def]
    """d (a float16) and whole t in low .. high so that d * t is near v, errors weighted by curvature."""
    big = ZERO
    for i in range(len(v)):
        if abs(v[i]) > abs(big):
            big = v[i]
    best, best_d, best_inv = HUGE, ZERO, ZERO
    for n in range(len(ends)):
        d = _half(big * ends[n])
        inv = ZERO if d == ZERO else ONE / d
        error = misfit(v, curvature, ss, d, inv, low, high)
        better = error < best
        best, best_d, best_inv = (error if better else best), (d if better else best_d), (inv if better else best_inv)
    for i in range(len(v)):
        t[i] = _whole(v[i] * best_inv, low, high)
    return best_d


@_jit
def _first(real, w1, ss, ends, limits, minimum, steps, minimums):  # type: ignore[no-untyped-def]
    """d, dmin and whole numbers near the real scales; real [5, S] = step, minimum, w q, w q^2, room for curvatures."""
    if limits[3] == ZERO:
        steps[0] = minimums[0] = ONE
        return _half(real[0, 0]), (_half(real[1, 0]) if minimum is not None else ZERO)
    for i in range(len(steps)):
        real[4, i] = real[3, i]
        if minimum is not None:
            real[4, i] = _high(real[3, i] - real[2, i] * real[2, i] / w1[i], ZERO)
    d = _stored(real[0], real[4], ss, limits[2], limits[3], ends, steps)
    if minimum is None:
        return d, ZERO
    for i in range(len(steps)):  # the best minimum at the step that is stored
        real[1, i] = _high(real[1, i] + (d * steps[i] - real[0, i]) * real[2, i] / w1[i], ZERO)
    return d, _stored(real[1], w1, ss, ZERO, limits[4], ends, minimums)


@_jit
def _at(x, w, ks, d, dmin, steps, minimums, sums, limits, minimum, uneven):  # type: ignore[no-untyped-def]
    """The error of a block at stored scales; `sums` [5, S] takes each sub-block's sums."""
    total = ZERO
    for i in range(len(steps)):
        m = dmin * minimums[i] if minimum is not None else ZERO
        part = slice(i * len(ks), (i + 1) * len(ks))
        rr, r1, rq, q1, qq = _sums(x[part], w[part], ks, d * steps[i], m, limits, minimum, uneven)
        sums[0, i], sums[1, i], sums[2, i], sums[3, i], sums[4, i] = rr, r1, rq, q1, qq
        total += rr
    return total


@_jit
def _refit_whole(d, dmin, steps, minimums, sums, w1, limits, minimum):  # type: ignore[no-untyped-def]
    """Each sub-block's whole numbers by least squares for its levels; `sums` follow."""
    for i in range(len(steps)):
        r1, rq, q1, qq = sums[1, i], sums[2, i], sums[3, i], sums[4, i]
        if d != ZERO and qq > ZERO:
            t = _whole(steps[i] + rq / (qq * d), limits[2], limits[3])
            ds = d * (t - steps[i])
            steps[i] = t
            rq -= ds * qq
            r1 -= ds * q1
        if minimum is not None and dmin != ZERO:
            t = _whole(minimums[i] - r1 / (w1[i] * dmin), ZERO, limits[4])
            dm = dmin * (t - minimums[i])
            minimums[i] = t
            rq += dm * q1
            r1 += dm * w1[i]
        sums[1, i], sums[2, i] = r1, rq


@_jit
def _refit_d(d, dmin, steps, minimums, sums, w1, minimum):  # type: ignore[no-untyped-def]
    """d and dmin by least squares for the levels and whole numbers."""
    a = b = c = right = left = ZERO
    for i in range(len(steps)):
        a += steps[i] * steps[i] * sums[4, i]
        right += steps[i] * sums[2, i]
        if minimum is not None:
            b += steps[i] * minimums[i] * sums[3, i]
            c += minimums[i] * minimums[i] * w1[i]
            left -= minimums[i] * sums[1, i]
    if a <= ZERO:
        return d, (_half(dmin + left / c) if c > ZERO else dmin)
    if minimum is None or c <= ZERO:
        return _half(d + right / a), dmin
    det = a * c - b * b
    if det <= SINGULAR * a * c:
        return d, dmin
    return _half(d + (right * c + b * left) / det), _half(dmin + (a * left + b * right) / det)


@_jit
def _write(x, ks, d, dmin, steps, minimums, limits, minimum, uneven, codes):  # type: ignore[no-untyped-def]
    """The codes of a block at stored scales."""
    for i in range(len(steps)):
        s = d * steps[i]
        inv = ZERO if s == ZERO else ONE / s
        shift = dmin * minimums[i] * inv if minimum is not None else ZERO
        part = slice(i * len(ks), (i + 1) * len(ks))
        write_codes(x[part], codes[part], ks, inv, shift, limits[0], limits[1], limits[5], uneven)


@_jit
def _search(
    first, stop, x, w, per_row, share, ks, ss, limits, tries, refits, ends, rounds, minimum, uneven,
    d_out, dmin_out, steps_out, minimums_out, codes_out,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Search the blocks first .. stop. limits: lowest, top level; lowest, top step; top minimum; level 0."""
    subs = steps_out.shape[1]
    real, sums, w1 = np.empty((5, subs), np.float32), np.empty((5, subs), np.float32), np.empty(subs, np.float32)
    steps, minimums = np.ones(subs, np.float32), np.ones(subs, np.float32)
    kept = np.ones((2, subs), np.float32)
    for p in range(first, stop):
        xp, wp = x[p], w[p // (per_row * share) * per_row + p % per_row]
        for i in range(subs):
            part = slice(i * len(ks), (i + 1) * len(ks))
            real[0, i], real[1, i], real[2, i], real[3, i], w1[i] = _real(
                xp[part], wp[part], ks, tries, refits, limits, minimum, uneven
            )
        d, dmin = _first(real, w1, ss, ends, limits, minimum, steps, minimums)
        best, best_d, best_dmin = HUGE, d, dmin
        for n in range(rounds + 1):
            error = _at(xp, wp, ks, d, dmin, steps, minimums, sums, limits, minimum, uneven)
            if not error < best:
                break
            best, best_d, best_dmin = error, d, dmin
            kept[0], kept[1] = steps, minimums
            if n < rounds:
                if limits[3] != ZERO:
                    _refit_whole(d, dmin, steps, minimums, sums, w1, limits, minimum)
                d, dmin = _refit_d(d, dmin, steps, minimums, sums, w1, minimum)
        d_out[p], dmin_out[p] = half_bits(best_d), half_bits(best_dmin)
        for i in range(subs):
            steps_out[p, i], minimums_out[p, i] = np.int16(kept[0, i]), np.int16(kept[1, i])
        _write(xp, ks, best_d, best_dmin, kept[0], kept[1], limits, minimum, uneven, codes_out[p])


@_jit
def _exponents(first, stop, x, w, per_row, share, ks, uneven, exponents, codes):  # type: ignore[no-untyped-def]
    """MXFP4's exponents and codes of the blocks first .. stop: the best of three around the largest magnitude."""
    for p in range(first, stop):
        xp, wp = x[p], w[p // (per_row * share) * per_row + p % per_row]
        least, most, _ = span(xp, wp, ks)
        largest = _high(_high(most, -least), FLOOR)
        # The largest magnitude comes to lie at 8 to 16 steps; the end level is 12.
        middle = min(max(int(np.floor(np.log2(largest))) + 125, 1), 252)
        best, best_e = HUGE, middle
        for e in (middle, middle + 1, middle - 1):
            inv = np.float32(2.0 ** (128 - e))
            rr = sums(xp, wp, ks, inv, ZERO, ZERO, ZERO, None, uneven)[0] / (inv * inv)
            if rr < best:
                best, best_e = rr, e
        exponents[p] = best_e
        write_codes(xp, codes[p], ks, np.float32(2.0 ** (128 - best_e)), ZERO, ZERO, ZERO, ZERO, uneven)
