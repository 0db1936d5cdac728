"""Search the scales of ggml blocks on CUDA (Triton): the steps of `search_cpu`, a few blocks per program.

A program holds a tile of weights [sub-blocks, columns of a sub-block] in registers for all starts and rounds; sums over
a sub-block reduce the second axis, sums over a block reduce the sub-blocks of a [blocks, sub-blocks] view.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .effort import Plan
from .weighted import Found, Weighted

_TILE, _WARPS = 1024, 2  # weights and warps of a program
_HUGE = tl.constexpr(3e38)


@triton.jit
def _uneven(y, INDEX: tl.constexpr):
    """IQ4's nearest level, or its index."""
    a: tl.constexpr = 1.0 if INDEX else 23.0
    q = tl.where(y > -115.5, a, 0.0)
    q += tl.where(y > -93.5, 1.0 if INDEX else 21.0, 0.0)
    q += tl.where(y > -74.0, 1.0 if INDEX else 18.0, 0.0)
    q += tl.where(y > -57.0, 1.0 if INDEX else 16.0, 0.0)
    q += tl.where(y > -42.0, 1.0 if INDEX else 14.0, 0.0)
    q += tl.where(y > -28.5, 1.0 if INDEX else 13.0, 0.0)
    q += tl.where(y > -16.0, 1.0 if INDEX else 12.0, 0.0)
    q += tl.where(y > -4.5, 1.0 if INDEX else 11.0, 0.0)
    q += tl.where(y > 7.0, 1.0 if INDEX else 12.0, 0.0)
    q += tl.where(y > 19.0, 1.0 if INDEX else 12.0, 0.0)
    q += tl.where(y > 31.5, 1.0 if INDEX else 13.0, 0.0)
    q += tl.where(y > 45.5, 1.0 if INDEX else 15.0, 0.0)
    q += tl.where(y > 61.0, 1.0 if INDEX else 16.0, 0.0)
    q += tl.where(y > 79.0, 1.0 if INDEX else 20.0, 0.0)
    q += tl.where(y > 101.0, 1.0 if INDEX else 24.0, 0.0)
    return q if INDEX else q - 127.0


@triton.jit
def _whole(value, low, high):
    """The nearest whole number in low .. high."""
    return tl.floor(tl.minimum(tl.maximum(value, low), high) + 0.5)


@triton.jit
def _level(y, low, top, UNEVEN: tl.constexpr):
    if UNEVEN:
        q = _uneven(y, False)
    else:
        q = _whole(y, low, top)
    return q


@triton.jit
def _inverse(s):
    return tl.where(s == 0.0, 0.0, 1.0 / tl.where(s == 0.0, 1.0, s))


@triton.jit
def _half(v):
    return tl.minimum(tl.maximum(v, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _sums(x, w, s, m, low, top, MINIMUM: tl.constexpr, UNEVEN: tl.constexpr):
    """Sums [sub-blocks] of w r^2, w r, w r q, w q, w q^2 for the nearest levels at (s, m); r in units of x."""
    inv = _inverse(s)
    y = x * inv[:, None] + (m * inv)[:, None] if MINIMUM else x * inv[:, None]
    q = tl.where((s == 0.0)[:, None], 0.0, _level(y, low, top, UNEVEN))
    r = x + m[:, None] - s[:, None] * q if MINIMUM else x - s[:, None] * q
    wr, wq = w * r, w * q
    r1, q1 = s, s
    if MINIMUM:
        r1, q1 = tl.sum(wr, 1), tl.sum(wq, 1)
    return tl.sum(wr * r, 1), r1, tl.sum(wr * q, 1), q1, tl.sum(wq * q, 1)


@triton.jit
def _fit(rr, r1, rq, q1, qq, w1, s, m, MINIMUM: tl.constexpr, SIGNED: tl.constexpr):
    """The best real (step, minimum) for the levels found at (s, m), and its error."""
    if MINIMUM:
        det = qq * w1 - q1 * q1
        usable = det > 1e-6 * qq * w1
        inv = 1.0 / tl.where(usable, det, 1.0)
        ds = (rq * w1 - r1 * q1) * inv
        dm = (q1 * rq - qq * r1) * inv
        usable = usable & (s + ds > 0.0)
        if not SIGNED:
            usable = usable & (m + dm >= 0.0)
        other = tl.zeros_like(m) if SIGNED else -m
        dm = tl.where(usable, dm, other)
        ds = tl.where(usable, ds, (rq + q1 * dm) * _inverse(qq))
        keep = (qq <= 0.0) | (s + ds <= 0.0)
        ds = tl.where(keep, 0.0, ds)
        dm = tl.where(keep, 0.0, dm)
        error = rr + ds * (ds * qq - 2.0 * rq) + dm * (2.0 * r1 - 2.0 * ds * q1 + dm * w1)
        return s + ds, m + dm, error
    else:
        ds = rq * _inverse(qq)
        return s + ds, m, rr - ds * rq


@triton.jit
def _stored(v, curvature, ends_ptr, ends, low, high):
    """d [blocks] and whole t [blocks, S] with d * t near v [blocks, S]."""
    least, most = tl.min(v, 1), tl.max(v, 1)
    big = tl.where(most >= -least, most, least)
    best = tl.zeros_like(big) + _HUGE
    best_d = tl.zeros_like(big)
    for n in range(ends):
        d = _half(big * tl.load(ends_ptr + n))
        t = _whole(v * _inverse(d)[:, None], low, high)
        r = v - d[:, None] * t
        error = tl.sum(curvature * r * r, 1)
        better = error < best
        best = tl.where(better, error, best)
        best_d = tl.where(better, d, best_d)
    return best_d, _whole(v * _inverse(best_d)[:, None], low, high)


@triton.jit
def _real(
    x, w, w1, tries_ptr, tries, refits, low, top, MINIMUM: tl.constexpr, SIGNED: tl.constexpr, UNEVEN: tl.constexpr
):
    """The best real (step, minimum) of each sub-block, and its levels' sums of w q and w q^2."""
    least, most = tl.min(x, 1), tl.max(x, 1)
    extent = tl.where(most >= -least, most, least)
    if MINIMUM:
        if not SIGNED:
            least = tl.minimum(least, 0.0)
        extent = most - least
    extent = tl.where(tl.abs(extent) < 1e-30, 0.0, extent)
    best = tl.zeros_like(w1) + _HUGE
    best_s, best_q1, best_qq = tl.zeros_like(w1), tl.zeros_like(w1), tl.zeros_like(w1)
    best_m = -least if MINIMUM else tl.zeros_like(w1)
    for t in range(tries + refits):
        index = tl.minimum(t, tries - 1)
        s = extent * tl.load(tries_ptr + 2 * index)
        m = tl.zeros_like(s)
        if MINIMUM:
            m = -least - tl.load(tries_ptr + 2 * index + 1) * s
            if not SIGNED:
                m = tl.maximum(m, 0.0)
        again = t >= tries
        s, m = tl.where(again, best_s, s), tl.where(again, best_m, m)
        rr, r1, rq, q1, qq = _sums(x, w, s, m, low, top, MINIMUM, UNEVEN)
        s, m, error = _fit(rr, r1, rq, q1, qq, w1, s, m, MINIMUM, SIGNED)
        better = error < best
        best = tl.where(better, error, best)
        best_s, best_m = tl.where(better, s, best_s), tl.where(better, m, best_m)
        best_q1, best_qq = tl.where(better, q1, best_q1), tl.where(better, qq, best_qq)
    return best_s, best_m, best_q1, best_qq


@triton.jit
def _first(s, m, q1, qq, w1, ends_ptr, ends, limits, MINIMUM: tl.constexpr, STORED: tl.constexpr):
    """d, dmin [blocks] and whole numbers [blocks, S] near the real scales [blocks, S]."""
    dmin = tl.zeros_like(tl.sum(s, 1))
    steps, minimums = tl.zeros_like(s) + 1.0, tl.zeros_like(s) + 1.0
    if STORED:
        curvature = tl.maximum(qq - q1 * q1 / w1, 0.0) if MINIMUM else qq
        d, steps = _stored(s, curvature, ends_ptr, ends, limits[2], limits[3])
        if MINIMUM:  # the best minimum at the step that is stored
            m = tl.maximum(m + (d[:, None] * steps - s) * q1 / w1, 0.0)
            dmin, minimums = _stored(m, w1, ends_ptr, ends, 0.0, limits[4])
    else:
        d = _half(tl.sum(s, 1))
        if MINIMUM:
            dmin = _half(tl.sum(m, 1))
    return d, dmin, steps, minimums


@triton.jit
def _refit_whole(d, dmin, steps, minimums, r1, rq, q1, qq, w1, limits, MINIMUM: tl.constexpr):
    """Each sub-block's whole numbers by least squares for its levels, and the sums of w r, w r q that follow."""
    new = _whole(steps + rq * _inverse(qq * d[:, None]), limits[2], limits[3])
    ds = d[:, None] * (new - steps)
    steps = new
    rq -= ds * qq
    if MINIMUM:
        r1 -= ds * q1
        new = _whole(minimums - r1 * _inverse(w1 * dmin[:, None]), 0.0, limits[4])
        dm = dmin[:, None] * (new - minimums)
        minimums = new
        rq += dm * q1
        r1 += dm * w1
    return steps, minimums, r1, rq


@triton.jit
def _refit_d(d, dmin, steps, minimums, r1, rq, q1, qq, w1, MINIMUM: tl.constexpr):
    """d and dmin by least squares for the levels and whole numbers."""
    a, right = tl.sum(steps * steps * qq, 1), tl.sum(steps * rq, 1)
    alone = d + right * _inverse(a)
    if MINIMUM:
        b, c = tl.sum(steps * minimums * q1, 1), tl.sum(minimums * minimums * w1, 1)
        left = -tl.sum(minimums * r1, 1)
        det = a * c - b * b
        usable = det > 1e-6 * a * c
        inv = 1.0 / tl.where(usable, det, 1.0)
        alone = tl.where(usable, d + (right * c + b * left) * inv, tl.where(c > 0.0, d, alone))
        flat = tl.where(a <= 0.0, dmin + left * _inverse(c), dmin)
        dmin = _half(tl.where(usable, dmin + (a * left + b * right) * inv, flat))
    return _half(alone), dmin


@triton.jit
def _write(x, d, dmin, steps, minimums, low, top, MINIMUM: tl.constexpr, UNEVEN: tl.constexpr):
    """The codes of a tile at stored scales."""
    inv = _inverse(tl.reshape(d[:, None] * steps, (x.shape[0],)))
    y = x * inv[:, None]
    if MINIMUM:
        y += (tl.reshape(dmin[:, None] * minimums, (x.shape[0],)) * inv)[:, None]
    if UNEVEN:
        code = _uneven(y, True)
    else:
        code = _level(y, low, top, False)
    return code


@triton.jit
def _kernel(
    x_ptr, w_ptr, tries_ptr, ends_ptr, d_ptr, dmin_ptr, steps_ptr, minimums_ptr, codes_ptr,
    blocks, per_row, share, tries, ends, refits, rounds, low, top, step_low, step_high, minimum_high, level_0,
    S: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
    MINIMUM: tl.constexpr, SIGNED: tl.constexpr, UNEVEN: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """The blocks B * program .. of B; see `search_blocks` for the arguments."""
    limits = (low, top, step_low, step_high, minimum_high)
    sub = tl.arange(0, B * S)
    block = tl.program_id(0).to(tl.int64) * B + sub // S
    column = (sub % S)[:, None] * K + tl.arange(0, K)[None, :]
    there = (block < blocks)[:, None]
    place = block[:, None] * (S * K) + column
    which = block // (per_row * share) * per_row + block % per_row
    x = tl.load(x_ptr + place, mask=there, other=0.0)
    w = tl.load(w_ptr + which[:, None] * (S * K) + column, mask=there, other=1.0)
    flat = tl.sum(w, 1)
    sf, mf, q1f, qqf = _real(x, w, flat, tries_ptr, tries, refits, low, top, MINIMUM, SIGNED, UNEVEN)
    w1 = tl.reshape(flat, (B, S))
    real = (tl.reshape(sf, (B, S)), tl.reshape(mf, (B, S)), tl.reshape(q1f, (B, S)), tl.reshape(qqf, (B, S)))
    d, dmin, steps, minimums = _first(*real, w1, ends_ptr, ends, limits, MINIMUM, STORED)

    kept_d, kept_dmin, kept_steps, kept_minimums = d, dmin, steps, minimums
    least = tl.zeros_like(d) + _HUGE
    for _ in range(rounds + 1):
        s, m = tl.reshape(d[:, None] * steps, (B * S,)), tl.reshape(dmin[:, None] * minimums, (B * S,))
        rr, r1, rq, q1, qq = _sums(x, w, s, m, low, top, MINIMUM, UNEVEN)
        error = tl.sum(tl.reshape(rr, (B, S)), 1)
        better = error < least
        least = tl.where(better, error, least)
        kept_d, kept_dmin = tl.where(better, d, kept_d), tl.where(better, dmin, kept_dmin)
        kept_steps = tl.where(better[:, None], steps, kept_steps)
        kept_minimums = tl.where(better[:, None], minimums, kept_minimums)
        r1, rq, q1, qq = tl.reshape(r1, (B, S)), tl.reshape(rq, (B, S)), tl.reshape(q1, (B, S)), tl.reshape(qq, (B, S))
        if STORED:
            steps, minimums, r1, rq = _refit_whole(d, dmin, steps, minimums, r1, rq, q1, qq, w1, limits, MINIMUM)
        d, dmin = _refit_d(d, dmin, steps, minimums, r1, rq, q1, qq, w1, MINIMUM)

    out = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    here = out < blocks
    table = out[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(d_ptr + out, kept_d.to(tl.float16), mask=here)
    tl.store(dmin_ptr + out, kept_dmin.to(tl.float16), mask=here)
    tl.store(steps_ptr + table, kept_steps.to(tl.int16), mask=here[:, None])
    tl.store(minimums_ptr + table, kept_minimums.to(tl.int16), mask=here[:, None])
    code = _write(x, kept_d, kept_dmin, kept_steps, kept_minimums, low, top, MINIMUM, UNEVEN)
    tl.store(codes_ptr + place, (code - level_0).to(tl.uint8), mask=there)


def search_blocks(blocks: Weighted, plan: Plan, found: Found) -> None:
    """Fill `found` for all blocks."""
    form, count, size = plan.form, *blocks.x.shape
    tile = max(1, _TILE // size)
    low, high = form.steps or (0, 0)
    limits = (form.lowest, form.levels[-1], low, high, form.minimums or 0, form.levels[0] if form.uniform else 0)
    _kernel[(triton.cdiv(count, tile),)](
        blocks.x, blocks.w, plan.tries.to(blocks.x.device), plan.ends.to(blocks.x.device),
        found.d, found.dmin, found.steps, found.minimums, found.codes,
        count, blocks.per_row, blocks.share, len(plan.tries), len(plan.ends), plan.refits, plan.rounds,
        *(float(v) for v in limits),
        S=size // form.sub, K=form.sub, B=tile, MINIMUM=form.minimums is not None, SIGNED=form.minimums == 0,
        UNEVEN=not form.uniform, STORED=form.steps is not None, num_warps=_WARPS,
    )  # fmt: skip
