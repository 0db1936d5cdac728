"""Fit the step and minimum of sub-blocks, one in each lane, on the CPU (numba): the parts of `search_cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...simd.memory import load
from ...simd.tiles import inline
from ...simd.vectors import filled, larger, nearest_whole, rounded, smaller, uneven_level, where, within

if TYPE_CHECKING:
    from ...simd.typed import Floats, Lanes, Number, Vector

    Sums = tuple[Vector, Vector, Vector, Vector, Vector]  # of w r^2, w r, w r q, w q, w q^2
    Stored = tuple[Vector, Vector, Vector, Vector]  # d, dmin and the whole numbers of steps and minimums

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
HUGE, TINY = np.float32(3e38), np.float32(1e-30)
Limits = tuple[np.float32, ...]  # lowest, top level; lowest, top step; top minimum; level 0
SINGULAR = np.float32(1e-6)


@inline
def whole_in(value: Vector, low: Number, high: Number):
    """The nearest whole number in low .. high."""
    return nearest_whole(smaller(larger(value, low), high))


@inline
def inverse(s: Vector):
    """1 / s, 0 where s is 0."""
    return where(s == ZERO, ZERO, ONE / where(s == ZERO, ONE, s))


@inline
def sums_at(
    x: Floats, w: Floats, ks: Lanes, s: Vector, m: Vector, limits: Limits, minimum: bool | None, uneven: bool | None
):
    """Sums of w r^2, w r, w r q, w q, w q^2 for the levels q nearest at lanes (s, m); x, w [K, L]."""
    inv = inverse(s)
    shift = m * inv
    rr = r1 = rq = q1 = qq = filled(ZERO, s)
    for k in range(len(ks)):
        at = k * x.shape[1]
        value, weight = load(x, at, s), load(w, at, s)
        y = value * inv
        if minimum is not None:
            y = y + shift
        q = whole_in(y, limits[0], limits[1]) if uneven is None else uneven_level(y)
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
def _fit(sums: Sums, w1: Vector, s: Vector, m: Vector, signed: bool, minimum: bool | None):
    """The best real (step, minimum) for the levels found at (s, m), and its error."""
    rr, r1, rq, q1, qq = sums
    if minimum is None:
        ds = rq * inverse(qq)
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
    ds = where(usable, ds, (rq + q1 * dm) * inverse(qq))
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
def best_real(
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
        sums = sums_at(x, w, ks, s, m, limits, minimum, uneven)
        s, m, error = _fit(sums, w1, s, m, signed, minimum)
        better = error < best
        best, best_s, best_m = where(better, error, best), where(better, s, best_s), where(better, m, best_m)
        best_q1, best_qq = where(better, sums[3], best_q1), where(better, sums[4], best_qq)
    return best_s, best_m, best_q1, best_qq, w1


@inline
def _stored(v: Vector, curvature: Vector, low: Number, high: Number, ends: Floats, subs: Lanes):
    """Each block's d (a float16) and whole t in low .. high so that d * t is near v, errors weighted by curvature."""
    least, most = within(v, subs, "minnum"), within(v, subs, "maxnum")
    big = where(most >= -least, most, least)
    best, best_d, best_inv = filled(HUGE, v), filled(ZERO, v), filled(ZERO, v)
    for n in range(len(ends)):
        d = rounded(big * ends[n])
        inv = inverse(d)
        r = v - d * whole_in(v * inv, low, high)
        error = within(curvature * r * r, subs, "fadd")
        better = error < best
        best, best_d, best_inv = where(better, error, best), where(better, d, best_d), where(better, inv, best_inv)
    return best_d, whole_in(v * best_inv, low, high)


@inline
def first_stored(
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
def refit_whole(stored: Stored, sums: Sums, w1: Vector, limits: Limits, minimum: bool | None):
    """Each sub-block's whole numbers by least squares for its levels, and the sums that follow."""
    d, dmin, steps, minimums = stored
    rr, r1, rq, q1, qq = sums
    new = whole_in(steps + rq * inverse(qq * d), limits[2], limits[3])
    ds = d * (new - steps)
    steps = new
    rq = rq - ds * qq
    if minimum is not None:
        r1 = r1 - ds * q1
        new = whole_in(minimums - r1 * inverse(w1 * dmin), ZERO, limits[4])
        dm = dmin * (new - minimums)
        minimums = new
        rq, r1 = rq + dm * q1, r1 + dm * w1
    return (d, dmin, steps, minimums), (rr, r1, rq, q1, qq)


@inline
def refit_d(stored: Stored, sums: Sums, w1: Vector, subs: Lanes, minimum: bool | None):
    """Each block's d and dmin by least squares for the levels and whole numbers."""
    d, dmin, steps, minimums = stored
    _, r1, rq, q1, qq = sums
    a, right = within(steps * steps * qq, subs, "fadd"), within(steps * rq, subs, "fadd")
    alone = d + right * inverse(a)
    if minimum is None:
        return rounded(alone), dmin
    b = within(steps * minimums * q1, subs, "fadd")
    c = within(minimums * minimums * w1, subs, "fadd")
    left = -within(minimums * r1, subs, "fadd")
    det = a * c - b * b
    usable = det > SINGULAR * a * c
    inv = ONE / where(usable, det, ONE)
    flat = where(a <= ZERO, dmin + left * inverse(c), dmin)
    alone = where(c > ZERO, d, alone)
    d = where(usable, d + (right * c + b * left) * inv, alone)
    return rounded(d), rounded(where(usable, dmin + (a * left + b * right) * inv, flat))
