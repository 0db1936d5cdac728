# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
"""Exhaustive search of the codebooks of the I-quants on CPU (numba): errors at many scales, and the nearest points.

With a = w*|x|, and P = 2 a.c and Q = w.c^2 for each point c of the codebook, the weighted error at any scale s is
w.x^2 - sP + s^2 Q: P and Q are formed once, after which one more scale costs two operations a point. Where the number
of minus signs must be even but is odd, the cheapest weight to turn costs 4s min_i(a_i c_i): P falls by 4 min_i(a_i
c_i), still exactly. The points of IQ1 are signed and shifted by +-delta: a = w*x, and both shifts share their
products. Kernels leave the constant w.x^2 out and take NumPy arrays: `iquants_search` has the meaning of their
arguments.
"""

from __future__ import annotations

import numba
import numpy as np

from .lanes import filled, larger, least_of, nearest_whole, smaller, total_of, where
from .lanes_memory import load, store

HUGE = np.float32(3e38)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
FREE, PARITY, DELTA_EACH, DELTA_SHARED = range(4)
PAIR = (0,) * 8
LANES = (0,) * 16  # points side by side; the number of points is a multiple
PAD = 16  # zeros behind each row of the codebook: rows a power of two apart would share one set of the cache
_jit = numba.njit(cache=True, fastmath=True, nogil=True)


@_jit
def _products(a, w, points, p, q, linear):  # type: ignore[no-untyped-def]
    """P, Q and (unless None) w.c of four groups a, w [4, group] for all points [group, N + PAD]."""
    row = points.shape[1]
    for n in range(0, p.shape[1], len(LANES)):
        p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = l0 = l1 = l2 = l3 = filled(ZERO, LANES)
        for i in range(points.shape[0]):
            c = load(points, i * row + n, LANES)
            square = c * c
            p0, p1, p2, p3 = p0 + a[0, i] * c, p1 + a[1, i] * c, p2 + a[2, i] * c, p3 + a[3, i] * c
            q0, q1, q2, q3 = q0 + w[0, i] * square, q1 + w[1, i] * square, q2 + w[2, i] * square, q3 + w[3, i] * square
            if linear is not None:
                l0, l1, l2, l3 = l0 + w[0, i] * c, l1 + w[1, i] * c, l2 + w[2, i] * c, l3 + w[3, i] * c
        _store_four(p, n, p0, p1, p2, p3)
        _store_four(q, n, q0, q1, q2, q3)
        if linear is not None:
            _store_four(linear, n, l0, l1, l2, l3)


@_jit
def _store_four(out, n, first, second, third, fourth):  # type: ignore[no-untyped-def]
    store(out, n, first)
    store(out, out.shape[1] + n, second)
    store(out, 2 * out.shape[1] + n, third)
    store(out, 3 * out.shape[1] + n, fourth)


@_jit
def _turn(a, points, p, turned):  # type: ignore[no-untyped-def]
    """P of one group when the cheapest sign of each point is turned; `a` holds 2 w |x|."""
    for n in range(0, p.size, len(LANES)):
        least = a[0] * load(points, n, LANES)
        for i in range(1, a.size):
            least = smaller(least, a[i] * load(points, i * points.shape[1] + n, LANES))
        store(turned, n, load(p, n, LANES) - TWO * least)


@_jit
def _shift(x, w, delta, q, linear):  # type: ignore[no-untyped-def]
    """Q of a group's points shifted by delta (in q) and by -delta (in linear), from Q and w.c; returns 2 delta w.x."""
    total, weight = ZERO, ZERO
    for i in range(8):
        total += x[i] * w[i]
        weight += w[i]
    both, square = TWO * delta, delta * delta * weight
    for n in range(0, q.size, len(LANES)):
        bend, middle = both * load(linear, n, LANES), load(q, n, LANES) + square
        store(q, n, middle + bend)
        store(linear, n, middle - bend)
    return both * total


@_jit
def _least(p, q, scales, out):  # type: ignore[no-untyped-def]
    """Least error of all points at each scale; four scales share the loads. scales: a multiple of four of them."""
    for k in range(0, scales.size, 4):
        s0, s1, s2, s3 = scales[k], scales[k + 1], scales[k + 2], scales[k + 3]
        e0 = e1 = e2 = e3 = filled(HUGE, LANES)
        for n in range(0, p.size, len(LANES)):
            pull, bend = load(p, n, LANES), load(q, n, LANES)
            e0, e1 = smaller(e0, s0 * bend - pull), smaller(e1, s1 * bend - pull)
            e2, e3 = smaller(e2, s2 * bend - pull), smaller(e3, s3 * bend - pull)
        out[k], out[k + 1] = s0 * least_of(e0), s1 * least_of(e1)
        out[k + 2], out[k + 3] = s2 * least_of(e2), s3 * least_of(e3)


@_jit
def _nearest(p, q, scale):  # type: ignore[no-untyped-def]
    """Index of the first least scale * q - p, and its value."""
    values, places = np.empty(len(LANES), np.float32), np.empty(len(LANES), np.float32)
    best, place = filled(HUGE, LANES), filled(ZERO, LANES)
    for n in range(0, p.size, len(LANES)):
        error = scale * load(q, n, LANES) - load(p, n, LANES)
        better = error < best
        best, place = where(better, error, best), where(better, np.float32(n), place)
    store(values, 0, best)
    store(places, 0, place)
    index, least = p.size, HUGE
    for i in range(len(LANES)):
        at = int(places[i]) + i
        if values[i] < least or (values[i] == least and at < index):
            index, least = at, values[i]
    return index, least


@numba.njit(cache=True, nogil=True)
def _odd(x):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.size):
        count += x[i] < 0
    return count % 2 == 1


@numba.njit(cache=True, nogil=True)
def _prepare(x, w, points, rule, delta, a, weight, p, q, other, tilt, odd):  # type: ignore[no-untyped-def]
    """P, Q and what the sign rule needs (`other`: turned P, or Q at -delta) of all groups of x."""
    group = points.shape[0]
    groups = x.size // group
    for g in range(groups):
        for i in range(group):
            at = g * group + i
            a[g, i] = TWO * w[at] * (x[at] if rule >= DELTA_EACH else abs(x[at]))
            weight[g, i] = w[at]
    for g in range(0, groups, 4):
        four = slice(g, g + 4)
        if rule >= DELTA_EACH:
            _products(a[four], weight[four], points, p[four], q[four], other[four])
        else:
            _products(a[four], weight[four], points, p[four], q[four], None)
    for g in range(groups):
        if rule >= DELTA_EACH:
            tilt[g] = _shift(x[g * 8 : g * 8 + 8], weight[g], delta, q[g], other[g])
        elif rule == PARITY:
            first = g * group // 8 * 8
            odd[g] = _odd(x[first : first + 8])
            if odd[g]:
                _turn(a[g], points, p[g], other[g])


@numba.njit(cache=True, nogil=True)
def _errors(p, q, other, tilt, odd, group, rule, scales, pair, out):  # type: ignore[no-untyped-def]
    """Error of one block at each scale; pair [2, S] is scratch."""
    out[:] = 0
    pair[:] = 0
    if rule == DELTA_SHARED:
        total = np.zeros((2, scales.size), np.float32)
        for g in range(p.shape[0]):
            _least_shifted(p[g], q[g], other[g], tilt[g], scales, pair)
            total += pair
        out[:] = np.minimum(total[0], total[1])
    elif rule == DELTA_EACH:
        for g in range(p.shape[0]):
            _least_shifted(p[g], q[g], other[g], tilt[g], scales, pair)
            out += np.minimum(pair[0], pair[1])
    elif rule == PARITY and group == 4:
        _errors_paired(p, q, other, odd, scales, out)
    else:
        for g in range(p.shape[0]):
            _least(other[g] if rule == PARITY and odd[g] else p[g], q[g], scales, pair[0])
            out += pair[0]


@_jit
def _least_shifted(p, plus, minus, tilt, scales, out):  # type: ignore[no-untyped-def]
    """As `_least`, for points shifted by +delta (out[0]) and -delta (out[1])."""
    _least(p, plus, scales, out[0])
    _least(p, minus, scales, out[1])
    for k in range(scales.size):
        out[0, k] -= scales[k] * tilt
        out[1, k] += scales[k] * tilt


@numba.njit(cache=True, nogil=True)
def _errors_paired(p, q, other, odd, scales, out):  # type: ignore[no-untyped-def]
    """IQ3_XXS: two points share one parity; the turned sign is in one of them."""
    plain, turned = np.empty((2, scales.size), np.float32), np.empty((2, scales.size), np.float32)
    for g in range(0, p.shape[0], 2):
        for half in range(2):
            _least(p[g + half], q[g + half], scales, plain[half])
            if odd[g]:
                _least(other[g + half], q[g + half], scales, turned[half])
        if odd[g]:
            out += np.minimum(plain[0] + turned[1], turned[0] + plain[1])
        else:
            out += plain[0] + plain[1]


@_jit
def _unbound(x, w, rule, delta, scales, out):  # type: ignore[no-untyped-def]
    """As `_errors` for IQ1 if every vector of -1, 0 and 1 were a point; with the constant, x and w of one block."""
    for k in range(scales.size):
        s = scales[k]
        inv, total, apart = ONE / larger(s, np.float32(1e-30)), filled(ZERO, PAIR), ZERO
        each = np.float32(0)
        for i in range(0, x.size, 8):
            value, weight = load(x, i, PAIR), load(w, i, PAIR)
            plus = value - s * (smaller(larger(nearest_whole(value * inv - delta), -ONE), ONE) + delta)
            minus = value - s * (smaller(larger(nearest_whole(value * inv + delta), -ONE), ONE) - delta)
            first, second = total_of(weight * plus * plus), total_of(weight * minus * minus)
            each += smaller(first, second)
            apart += first - second
            total = total + weight * plus * plus
        out[k] = each if rule == DELTA_EACH else total_of(total) - larger(apart, ZERO)


@numba.njit(cache=True, nogil=True)
def _pick(p, q, other, odd, rule, s, code, flag):  # type: ignore[no-untyped-def]
    """Nearest points of one block at scale s, when every group has its own rule; flag: this group has a sign turned."""
    for g in range(p.shape[0]):
        flag[g] = rule == PARITY and odd[g]
        code[g], _ = _nearest(other[g] if flag[g] else p[g], q[g], s)


@numba.njit(cache=True, nogil=True)
def _pick_paired(p, q, other, odd, s, code, flag):  # type: ignore[no-untyped-def]
    found, cost = np.empty((2, 2), np.int64), np.empty((2, 2), np.float32)
    for g in range(0, p.shape[0], 2):
        for half in range(2):
            found[half, 0], cost[half, 0] = _nearest(p[g + half], q[g + half], s)
            if odd[g]:
                found[half, 1], cost[half, 1] = _nearest(other[g + half], q[g + half], s)
        second = odd[g] and cost[0, 0] + cost[1, 1] < cost[0, 1] + cost[1, 0]
        flag[g], flag[g + 1] = odd[g] and not second, second
        code[g], code[g + 1] = found[0, int(flag[g])], found[1, int(flag[g + 1])]


@numba.njit(cache=True, nogil=True)
def _pick_shifted(p, q, other, tilt, rule, s, code, flag):  # type: ignore[no-untyped-def]
    """Nearest shifted points of one block; flag: delta is negative."""
    found, total = np.empty((2, p.shape[0]), np.int64), np.zeros(2, np.float32)
    for g in range(p.shape[0]):
        found[0, g], plus = _nearest(p[g], q[g], s)
        found[1, g], minus = _nearest(p[g], other[g], s)
        plus, minus = plus - tilt[g], minus + tilt[g]
        flag[g] = minus < plus
        total[0] += plus
        total[1] += minus
    for g in range(p.shape[0]):
        if rule == DELTA_SHARED:
            flag[g] = total[1] < total[0]
        code[g] = found[int(flag[g]), g]


@numba.njit(cache=True, nogil=True)
def _sign_bytes(x, a, points, code, flag, signs):  # type: ignore[no-untyped-def]
    """Signs of one block: those of x, with the cheapest of each flagged group turned."""
    group = points.shape[0]
    signs[:] = 0
    for i in range(x.size):
        signs[i // 8] |= np.uint8((x[i] < 0) << (i % 8))
    for g in range(code.size):
        if flag[g]:
            least, place = HUGE, 0
            for i in range(group):
                price = a[g, i] * points[i, code[g]]
                if price < least:
                    least, place = price, g * group + i
            signs[place // 8] ^= np.uint8(1 << (place % 8))


@numba.njit(cache=True, nogil=True)
def search(x, w, scales, points, rule, delta, errors, chosen, code, signs, minus):  # type: ignore[no-untyped-def]
    """Errors [B, S] of blocks x, w [B, shared] at scales [B, S].

    When `chosen` [B] is not empty also the index of the best scale, and its nearest points: code [B, groups], signs and
    minus [B, octets].
    """
    group, entries = points.shape[0], points.shape[1] - PAD
    groups, steps = x.shape[1] // group, scales.shape[1]
    room = groups + -groups % 4  # the products are formed for four groups at a time
    a, weight = np.zeros((room, group), np.float32), np.zeros((room, group), np.float32)
    tilt, odd = np.zeros(groups, np.float32), np.zeros(groups, np.bool_)
    all_p, all_q = np.empty((room, entries), np.float32), np.empty((room, entries), np.float32)
    all_other = np.empty((room, entries), np.float32)
    p, q, other = all_p[:groups], all_q[:groups], all_other[:groups]
    pair, flag = np.zeros((2, steps), np.float32), np.zeros(groups, np.bool_)
    for b in range(x.shape[0]):
        _prepare(x[b], w[b], points, rule, delta, a, weight, all_p, all_q, all_other, tilt, odd)
        _errors(p, q, other, tilt, odd, group, rule, scales[b], pair, errors[b])
        if chosen.size == 0:
            continue
        chosen[b] = np.argmin(errors[b])
        s = scales[b, chosen[b]]
        if rule >= DELTA_EACH:
            _pick_shifted(p, q, other, tilt, rule, s, code[b], minus[b])
            continue
        if rule == PARITY and group == 4:
            _pick_paired(p, q, other, odd, s, code[b], flag)
        else:
            _pick(p, q, other, odd, rule, s, code[b], flag)
        _sign_bytes(x[b], a, points, code[b], flag, signs[b])
