"""Search the scales of ggml blocks on the CPU (numba), many sub-blocks side by side in vectors.

1. Each sub-block: the plan's starts, each fitted by least squares to its nearest levels; the best one once more.
2. Each block: the plan's d (and dmin) with the nearest stored integers, by the curvature of each sub-block's error.
3. Levels again at exactly what is stored, integers and d (dmin) refitted to them; the best round is kept.

Levels q at a step s and minimum m leave residuals r. For fixed levels the error of any other step and minimum is a
quadratic form in their differences, whose coefficients are the sums of w r^2, w r, w r q, w q and w q^2 (`_sums`).
Being sums of residuals they lose nothing to cancellation, also at 8 bits.

A tile has a sub-block in each lane: those of one block, two, or sixteen. What belongs to a block is the same number in
all its lanes. Columns of a sub-block (K), lanes (L) and sub-blocks of a block come as the lengths of the tuples ks, ls
and subs, `minimum` and `uneven` as None or True: what is compiled knows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch

from ...simd.memory import load, store, store_half
from ...simd.tiles import LANES, in_threads, inline, places, turned
from ...simd.vectors import filled, larger, nearest_whole, rounded, smaller, uneven_index, uneven_level, where, within
from .effort import Plan
from .weighted import Found, Weighted

if TYPE_CHECKING:
    from ...simd.typed import Bits, Floats, Integers, Lanes, Number, Vector

_CHUNK = 1 << 18  # weights of one call
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
HUGE, TINY = np.float32(3e38), np.float32(1e-30)
Limits = tuple[np.float32, ...]  # lowest, top level; lowest, top step; top minimum; level 0
SINGULAR = np.float32(1e-6)


def search_blocks(blocks: Weighted, plan: Plan, found: Found) -> None:
    """Fill `found` for all blocks, on as many threads as torch uses."""
    form, size = plan.form, blocks.x.shape[1]
    low, high = form.steps or (0, 0)
    limits = tuple(np.float32(v) for v in (form.lowest, form.levels[-1], low, high, form.minimums or 0, form.levels[0]))
    minimum, uneven = (None if form.minimums is None else True), (None if form.uniform else True)
    columns, lanes, subs = (0,) * form.sub, LANES, (0,) * (size // form.sub)
    inputs = (blocks.x.numpy(), blocks.w.numpy(), blocks.per_row, blocks.share, columns, lanes, subs)
    search = (limits, plan.tries.numpy(), plan.refits, plan.ends.numpy(), plan.rounds, minimum, uneven)
    out = (found.d.view(torch.uint16).numpy(), found.dmin.view(torch.uint16).numpy())
    out += (found.steps.numpy(), found.minimums.numpy(), found.codes.numpy())
    in_threads(lambda first, stop: _search(first, stop, *inputs, *search, *out), len(blocks.x), _CHUNK // size)


_jit = numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy")


@inline
def _whole(value: Vector, low: Number, high: Number):
    """The nearest whole number in low .. high."""
    return nearest_whole(smaller(larger(value, low), high))


@inline
def _inverse(s: Vector):
    """1 / s, 0 where s is 0."""
    return where(s == ZERO, ZERO, ONE / where(s == ZERO, ONE, s))


@inline
def _sums(
    x: Floats, w: Floats, ks: Lanes, s: Vector, m: Vector, limits: Limits, minimum: bool | None, uneven: bool | None
):
    """Sums of w r^2, w r, w r q, w q, w q^2 for the levels q nearest at lanes (s, m); x, w [K, L]."""
    inv = _inverse(s)
    shift = m * inv
    rr = r1 = rq = q1 = qq = filled(ZERO, s)
    for k in range(len(ks)):
        at = k * x.shape[1]
        value, weight = load(x, at, s), load(w, at, s)
        y = value * inv
        if minimum is not None:
            y = y + shift
        q = _whole(y, limits[0], limits[1]) if uneven is None else uneven_level(y)
        r = value - s * q
        if minimum is not None:
            r = r + m
        wr, wq = weight * r, weight * q
        rr = rr + wr * r
        rq = rq + wr * q
        qq = qq + wq * q
        if minimum is not None:
            r1 = r1 + wr
            q1 = q1 + wq
    return rr, r1, rq, q1, qq


@inline
def _fit(
    rr: Vector,
    r1: Vector,
    rq: Vector,
    q1: Vector,
    qq: Vector,
    w1: Vector,
    s: Vector,
    m: Vector,
    signed: bool,
    minimum: bool | None,
):
    """The best real (step, minimum) for the levels found at (s, m), and its error."""
    if minimum is None:
        ds = rq * _inverse(qq)
        return s + ds, m, rr - ds * rq
    det = qq * w1 - q1 * q1
    usable = det > SINGULAR * qq * w1
    inv = ONE / where(usable, det, ONE)
    ds = (rq * w1 - r1 * q1) * inv
    dm = (q1 * rq - qq * r1) * inv
    usable = usable & (s + ds > ZERO)
    other = filled(ZERO, s)
    if not signed:
        usable = usable & (m + dm >= ZERO)
        other = -m
    dm = where(usable, dm, other)
    ds = where(usable, ds, (rq + q1 * dm) * _inverse(qq))
    keep = (qq <= ZERO) | (s + ds <= ZERO)
    ds, dm = where(keep, ZERO, ds), where(keep, ZERO, dm)
    return s + ds, m + dm, rr + ds * (ds * qq - TWO * rq) + dm * (TWO * r1 - TWO * ds * q1 + dm * w1)


@inline
def _span(x: Floats, w: Floats, ks: Lanes, ls: Lanes):
    """The least and the largest of x [K, L] in each lane, and the sum of w."""
    least = most = load(x, 0, ls)
    flat = load(w, 0, ls)
    for k in range(1, len(ks)):
        value = load(x, k * len(ls), ls)
        least, most = smaller(least, value), larger(most, value)
        flat = flat + load(w, k * len(ls), ls)
    return least, most, flat


@inline
def _real(
    x: Floats,
    w: Floats,
    ks: Lanes,
    ls: Lanes,
    tries: Floats,
    refits: int,
    limits: Limits,
    minimum: bool | None,
    uneven: bool | None,
):
    """The best real (step, minimum) of each sub-block, its levels' sums of w q and w q^2, and the sum of w: lanes."""
    signed = limits[4] == ZERO
    least, most, w1 = _span(x, w, ks, ls)
    if minimum is None:
        extent, least = where(most >= -least, most, least), filled(ZERO, ls)
    else:
        if not signed:
            least = smaller(least, ZERO)
        extent = most - least
    extent = where(abs(extent) < TINY, ZERO, extent)
    best, best_s, best_m = filled(HUGE, ls), filled(ZERO, ls), -least
    best_q1 = best_qq = filled(ZERO, ls)
    for t in range(len(tries) + refits):
        s, m = best_s, best_m
        if t < len(tries):
            s = extent * tries[t, 0]
            m = -least - tries[t, 1] * s
            if not signed:
                m = larger(m, ZERO)
        rr, r1, rq, q1, qq = _sums(x, w, ks, s, m, limits, minimum, uneven)
        s, m, error = _fit(rr, r1, rq, q1, qq, w1, s, m, signed, minimum)
        better = error < best
        best, best_s, best_m = where(better, error, best), where(better, s, best_s), where(better, m, best_m)
        best_q1, best_qq = where(better, q1, best_q1), where(better, qq, best_qq)
    return best_s, best_m, best_q1, best_qq, w1


@inline
def _stored(v: Vector, curvature: Vector, low: Number, high: Number, ends: Floats, subs: Lanes):
    """Each block's d (a float16) and whole t in low .. high so that d * t is near v, errors weighted by curvature."""
    least, most = within(v, subs, "minnum"), within(v, subs, "maxnum")
    big = where(most >= -least, most, least)
    best, best_d, best_inv = filled(HUGE, v), filled(ZERO, v), filled(ZERO, v)
    for n in range(len(ends)):
        d = rounded(big * ends[n])
        inv = _inverse(d)
        r = v - d * _whole(v * inv, low, high)
        error = within(curvature * r * r, subs, "fadd")
        better = error < best
        best, best_d, best_inv = where(better, error, best), where(better, d, best_d), where(better, inv, best_inv)
    return best_d, _whole(v * best_inv, low, high)


@inline
def _first(
    s: Vector,
    m: Vector,
    q1: Vector,
    qq: Vector,
    w1: Vector,
    ends: Floats,
    limits: Limits,
    subs: Lanes,
    minimum: bool | None,
):
    """d, dmin and whole numbers near the real scales."""
    one, dmin = filled(ONE, s), filled(ZERO, s)
    if limits[3] == ZERO:
        return rounded(s), rounded(m), one, one
    if minimum is None:
        d, steps = _stored(s, qq, limits[2], limits[3], ends, subs)
        return d, dmin, steps, one
    d, steps = _stored(s, larger(qq - q1 * q1 / w1, ZERO), limits[2], limits[3], ends, subs)
    best = larger(m + (d * steps - s) * q1 / w1, ZERO)  # the minimum at the step that is stored
    dmin, minimums = _stored(best, w1, ZERO, limits[4], ends, subs)
    return d, dmin, steps, minimums


@inline
def _refit_whole(
    d: Vector,
    dmin: Vector,
    steps: Vector,
    minimums: Vector,
    r1: Vector,
    rq: Vector,
    q1: Vector,
    qq: Vector,
    w1: Vector,
    limits: Limits,
    minimum: bool | None,
):
    """Each sub-block's whole numbers by least squares for its levels, and the sums of w r, w r q that follow."""
    new = _whole(steps + rq * _inverse(qq * d), limits[2], limits[3])
    ds = d * (new - steps)
    steps = new
    rq = rq - ds * qq
    if minimum is not None:
        r1 = r1 - ds * q1
        new = _whole(minimums - r1 * _inverse(w1 * dmin), ZERO, limits[4])
        dm = dmin * (new - minimums)
        minimums = new
        rq, r1 = rq + dm * q1, r1 + dm * w1
    return steps, minimums, r1, rq


@inline
def _refit_d(
    d: Vector,
    dmin: Vector,
    steps: Vector,
    minimums: Vector,
    r1: Vector,
    rq: Vector,
    q1: Vector,
    qq: Vector,
    w1: Vector,
    subs: Lanes,
    minimum: bool | None,
):
    """Each block's d and dmin by least squares for the levels and whole numbers."""
    a, right = within(steps * steps * qq, subs, "fadd"), within(steps * rq, subs, "fadd")
    alone = d + right * _inverse(a)
    if minimum is None:
        return rounded(alone), dmin
    b = within(steps * minimums * q1, subs, "fadd")
    c = within(minimums * minimums * w1, subs, "fadd")
    left = -within(minimums * r1, subs, "fadd")
    det = a * c - b * b
    usable = det > SINGULAR * a * c
    inv = ONE / where(usable, det, ONE)
    flat = where(a <= ZERO, dmin + left * _inverse(c), dmin)
    alone = where(c > ZERO, d, alone)
    d = where(usable, d + (right * c + b * left) * inv, alone)
    return rounded(d), rounded(where(usable, dmin + (a * left + b * right) * inv, flat))


@inline
def _write(
    x: Floats, offset: int, ks: Lanes, inv: Number, shift: Number, limits: Limits, uneven: bool | None, codes: Bits
):
    """The codes of the sub-block that starts at `offset`."""
    y = load(x, offset, ks) * inv + shift
    q = _whole(y, limits[0], limits[1]) - limits[5] if uneven is None else uneven_index(y)
    store(codes, offset, q)


@_jit
def _search(
    first: int,
    stop: int,
    x: Floats,
    w: Floats,
    per_row: int,
    share: int,
    ks: Lanes,
    ls: Lanes,
    subs: Lanes,
    limits: Limits,
    tries: Floats,
    refits: int,
    ends: Floats,
    rounds: int,
    minimum: bool | None,
    uneven: bool | None,
    d_out: Bits,
    dmin_out: Bits,
    steps_out: Integers,
    minimums_out: Integers,
    codes: Bits,
):
    """Search the blocks first .. stop. limits: lowest, top level; lowest, top step; top minimum; level 0."""
    tile = len(ls) // len(subs)
    xt, wt = np.empty((len(ks), len(ls)), np.float32), np.empty((len(ks), len(ls)), np.float32)
    starts, other = np.empty(len(ls), np.int64), np.empty(len(ls), np.int64)
    inv, shift = np.empty(len(ls), np.float32), np.empty(len(ls), np.float32)
    halves, whole = np.empty((2, len(ls)), np.uint16), np.empty((2, len(ls)), np.int16)
    for begin in range(first, stop, tile):
        places(begin, stop, ks, subs, per_row, share, starts, other)
        turned(x, starts, ks, ls, xt)
        turned(w, other, ks, ls, wt)
        s, m, q1, qq, w1 = _real(xt, wt, ks, ls, tries, refits, limits, minimum, uneven)
        d, dmin, steps, minimums = _first(s, m, q1, qq, w1, ends, limits, subs, minimum)
        best, best_d, best_dmin, best_steps, best_minimums = filled(HUGE, ls), d, dmin, steps, minimums
        for n in range(rounds + 1):
            rr, r1, rq, q1, qq = _sums(xt, wt, ks, d * steps, dmin * minimums, limits, minimum, uneven)
            error = within(rr, subs, "fadd")
            better = error < best
            best, best_d, best_dmin = (
                where(better, error, best),
                where(better, d, best_d),
                where(better, dmin, best_dmin),
            )
            best_steps, best_minimums = where(better, steps, best_steps), where(better, minimums, best_minimums)
            if n < rounds:
                if limits[3] != ZERO:
                    steps, minimums, r1, rq = _refit_whole(
                        d, dmin, steps, minimums, r1, rq, q1, qq, w1, limits, minimum
                    )
                d, dmin = _refit_d(d, dmin, steps, minimums, r1, rq, q1, qq, w1, subs, minimum)
        inverse = _inverse(best_d * best_steps)
        store(inv, 0, inverse)
        store(shift, 0, best_dmin * best_minimums * inverse)
        store_half(halves, 0, best_d)
        store_half(halves, len(ls), best_dmin)
        store(whole, 0, best_steps)
        store(whole, len(ls), best_minimums)
        for i in range(min(tile, stop - begin)):
            at = i * len(subs)
            d_out[begin + i], dmin_out[begin + i] = halves[0, at], halves[1, at]
            for j in range(at, at + len(subs)):
                steps_out[begin + i, j - at], minimums_out[begin + i, j - at] = whole[0, j], whole[1, j]
                _write(x, starts[j], ks, inv[j], shift[j], limits, uneven, codes)
