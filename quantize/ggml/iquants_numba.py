"""Exhaustive search of the codebooks of the I-quants on CPU (numba): errors at many scales, and the nearest points.

With a = w*|x|, and P = 2 a.c and Q = w.c^2 for each point c of the codebook, the weighted error at any scale s is
w.x^2 - sP + s^2 Q: P and Q are formed once, after which one more scale costs two operations a point. Where the number
of minus signs must be even but is odd, the cheapest weight to turn costs 4s min_i(a_i c_i): P falls by 4 min_i(a_i
c_i), still exactly. The points of IQ1 are signed and shifted by +-delta: a = w*x, and both shifts share their
products. Kernels leave the constant w.x^2 out and take NumPy arrays: `iquants_search` has the meaning of their
arguments.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

HUGE = np.float32(3e38)
TWO = np.float32(2)
FREE, PARITY, DELTA_EACH, DELTA_SHARED = range(4)


def _minnum(context: Any, left: Any, right: Any) -> Any:
    """min() as LLVM's own operation: a loop over numba's `min` of floats is not vectorized (16 times slower here)."""
    signature = types.float32(types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.minnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(function, arguments, fastmath=("fast",))

    return signature, generate


_smaller: Any = intrinsic(_minnum)


@numba.njit(cache=True, fastmath=True, nogil=True)
def _products(a, w, points, row, p, q):  # type: ignore[no-untyped-def]
    """Four terms of P and Q of two groups a, w [2, group] for all points [group, N]: a point's loads serve both."""
    a0, a1, a2, a3 = a[0, row], a[0, row + 1], a[0, row + 2], a[0, row + 3]
    b0, b1, b2, b3 = a[1, row], a[1, row + 1], a[1, row + 2], a[1, row + 3]
    u0, u1, u2, u3 = w[0, row], w[0, row + 1], w[0, row + 2], w[0, row + 3]
    v0, v1, v2, v3 = w[1, row], w[1, row + 1], w[1, row + 2], w[1, row + 3]
    keep = np.float32(row > 0)
    for n in range(points.shape[1]):
        c0, c1, c2, c3 = points[row, n], points[row + 1, n], points[row + 2, n], points[row + 3, n]
        p[0, n] = keep * p[0, n] + (a0 * c0 + a1 * c1 + a2 * c2 + a3 * c3)
        p[1, n] = keep * p[1, n] + (b0 * c0 + b1 * c1 + b2 * c2 + b3 * c3)
        c0, c1, c2, c3 = c0 * c0, c1 * c1, c2 * c2, c3 * c3
        q[0, n] = keep * q[0, n] + (u0 * c0 + u1 * c1 + u2 * c2 + u3 * c3)
        q[1, n] = keep * q[1, n] + (v0 * c0 + v1 * c1 + v2 * c2 + v3 * c3)


@numba.njit(cache=True, fastmath=True, nogil=True)
def _turn(a, points, p, turned):  # type: ignore[no-untyped-def]
    """P of one group when the cheapest sign of each point is turned; `a` holds 2 w |x|."""
    a0, a1, a2, a3 = a[0], a[1], a[2], a[3]
    for n in range(p.size):
        left, right = _smaller(a0 * points[0, n], a1 * points[1, n]), _smaller(a2 * points[2, n], a3 * points[3, n])
        turned[n] = _smaller(left, right)
    if a.size == 8:
        a0, a1, a2, a3 = a[4], a[5], a[6], a[7]
        for n in range(p.size):
            left, right = _smaller(a0 * points[4, n], a1 * points[5, n]), _smaller(a2 * points[6, n], a3 * points[7, n])
            turned[n] = _smaller(turned[n], _smaller(left, right))
    for n in range(p.size):
        turned[n] = p[n] - TWO * turned[n]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _shift(x, w, points, delta, q, linear):  # type: ignore[no-untyped-def]
    """What delta changes in a group: 2 delta w.c in `linear`, delta^2 sum(w) more in q; returns 2 delta w.x."""
    total, weight = np.float32(0), np.float32(0)
    for i in range(8):
        total += x[i] * w[i]
        weight += w[i]
    both, square = TWO * delta, delta * delta * weight
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for n in range(q.size):
        low = w0 * points[0, n] + w1 * points[1, n] + w2 * points[2, n] + w3 * points[3, n]
        high = w4 * points[4, n] + w5 * points[5, n] + w6 * points[6, n] + w7 * points[7, n]
        linear[n] = both * (low + high)
        q[n] += square
    return both * total


@numba.njit(cache=True, fastmath=True, nogil=True)
def _least(p, q, scales, out):  # type: ignore[no-untyped-def]
    """Least error of all points at each scale; four scales share the loads. scales: a multiple of four of them."""
    for k in range(0, scales.size, 4):
        s0, s1, s2, s3 = scales[k], scales[k + 1], scales[k + 2], scales[k + 3]
        e0, e1, e2, e3 = HUGE, HUGE, HUGE, HUGE
        for n in range(p.size):
            e0 = _smaller(e0, s0 * q[n] - p[n])
            e1 = _smaller(e1, s1 * q[n] - p[n])
            e2 = _smaller(e2, s2 * q[n] - p[n])
            e3 = _smaller(e3, s3 * q[n] - p[n])
        out[k], out[k + 1], out[k + 2], out[k + 3] = s0 * e0, s1 * e1, s2 * e2, s3 * e3


@numba.njit(cache=True, fastmath=True, nogil=True)
def _least_shifted(p, q, linear, tilt, scales, out):  # type: ignore[no-untyped-def]
    """As `_least`, for points shifted by +delta (out[0]) and -delta (out[1]); two scales at a time."""
    for k in range(0, scales.size, 2):
        s0, s1 = scales[k], scales[k + 1]
        e0, e1, f0, f1 = HUGE, HUGE, HUGE, HUGE
        for n in range(p.size):
            base, bend = s0 * q[n] - p[n], s0 * linear[n]
            e0, f0 = _smaller(e0, base + bend), _smaller(f0, base - bend)
            base, bend = s1 * q[n] - p[n], s1 * linear[n]
            e1, f1 = _smaller(e1, base + bend), _smaller(f1, base - bend)
        out[0, k], out[0, k + 1] = s0 * (e0 - tilt), s1 * (e1 - tilt)
        out[1, k], out[1, k + 1] = s0 * (f0 + tilt), s1 * (f1 + tilt)


@numba.njit(cache=True, fastmath=True, nogil=True)
def _nearest(p, q, linear, slope, scale, error):  # type: ignore[no-untyped-def]
    """Index of the least of scale * (q + slope * linear) - p; error [N] is scratch that keeps the values."""
    best, bend = HUGE, slope * scale
    for n in range(p.size):
        error[n] = scale * q[n] + bend * linear[n] - p[n]
        best = _smaller(best, error[n])
    index = np.int32(p.size - 1)
    for n in range(p.size):  # a reduction over all, since a search that stops is not vectorized
        index = min(index, np.int32(n) if error[n] <= best else np.int32(p.size - 1))
    return index


@numba.njit(cache=True, nogil=True)
def _odd(x):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.size):
        count += x[i] < 0
    return count % 2 == 1


@numba.njit(cache=True, nogil=True)
def _prepare(x, w, points, rule, delta, a, weight, p, q, other, tilt, odd):  # type: ignore[no-untyped-def]
    """P, Q and what the sign rule needs (`other`: turned P, or the shift's share of Q) of all groups of one block."""
    group = points.shape[0]
    groups = x.size // group
    for g in range(groups):
        for i in range(group):
            at = g * group + i
            a[g, i] = TWO * w[at] * (x[at] if rule >= DELTA_EACH else abs(x[at]))
            weight[g, i] = w[at]
    for g in range(0, groups, 2):
        for row in range(0, group, 4):
            _products(a[g : g + 2], weight[g : g + 2], points, row, p[g : g + 2], q[g : g + 2])
    for g in range(groups):
        if rule >= DELTA_EACH:
            tilt[g] = _shift(x[g * 8 : g * 8 + 8], weight[g], points, delta, q[g], other[g])
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


@numba.njit(cache=True, nogil=True)
def _pick(p, q, other, odd, rule, s, error, code, flag):  # type: ignore[no-untyped-def]
    """Nearest points of one block at scale s, when every group has its own rule; flag: this group has a sign turned."""
    for g in range(p.shape[0]):
        flag[g] = rule == PARITY and odd[g]
        code[g] = _nearest(other[g] if flag[g] else p[g], q[g], p[g], np.float32(0), s, error)


@numba.njit(cache=True, nogil=True)
def _pick_paired(p, q, other, odd, s, error, code, flag):  # type: ignore[no-untyped-def]
    zero, found, cost = np.float32(0), np.empty((2, 2), np.int64), np.empty((2, 2), np.float32)
    for g in range(0, p.shape[0], 2):
        for half in range(2):
            found[half, 0] = _nearest(p[g + half], q[g + half], p[g], zero, s, error)
            cost[half, 0] = error[found[half, 0]]
            if odd[g]:
                found[half, 1] = _nearest(other[g + half], q[g + half], p[g], zero, s, error)
                cost[half, 1] = error[found[half, 1]]
        second = odd[g] and cost[0, 0] + cost[1, 1] < cost[0, 1] + cost[1, 0]
        flag[g], flag[g + 1] = odd[g] and not second, second
        code[g], code[g + 1] = found[0, int(flag[g])], found[1, int(flag[g + 1])]


@numba.njit(cache=True, nogil=True)
def _pick_shifted(p, q, other, tilt, rule, s, error, code, flag):  # type: ignore[no-untyped-def]
    """Nearest shifted points of one block; flag: delta is negative."""
    found, total = np.empty((2, p.shape[0]), np.int64), np.zeros(2, np.float32)
    for g in range(p.shape[0]):
        found[0, g] = _nearest(p[g], q[g], other[g], np.float32(1), s, error)
        plus = error[found[0, g]] - tilt[g]
        found[1, g] = _nearest(p[g], q[g], other[g], np.float32(-1), s, error)
        minus = error[found[1, g]] + tilt[g]
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
    group, entries = points.shape
    groups, steps = x.shape[1] // group, scales.shape[1]
    even = groups + groups % 2  # the products are formed for two groups at a time
    a, weight = np.zeros((even, group), np.float32), np.zeros((even, group), np.float32)
    tilt, odd = np.zeros(groups, np.float32), np.zeros(groups, np.bool_)
    all_p, all_q = np.empty((even, entries), np.float32), np.empty((even, entries), np.float32)
    p, q, other = all_p[:groups], all_q[:groups], np.empty((groups, entries), np.float32)
    pair, error, flag = np.zeros((2, steps), np.float32), np.empty(entries, np.float32), np.zeros(groups, np.bool_)
    for b in range(x.shape[0]):
        _prepare(x[b], w[b], points, rule, delta, a, weight, all_p, all_q, other, tilt, odd)
        _errors(p, q, other, tilt, odd, group, rule, scales[b], pair, errors[b])
        if chosen.size == 0:
            continue
        chosen[b] = np.argmin(errors[b])
        s = scales[b, chosen[b]]
        if rule >= DELTA_EACH:
            _pick_shifted(p, q, other, tilt, rule, s, error, code[b], minus[b])
            continue
        if rule == PARITY and group == 4:
            _pick_paired(p, q, other, odd, s, error, code[b], flag)
        else:
            _pick(p, q, other, odd, rule, s, error, code[b], flag)
        _sign_bytes(x[b], a, points, code[b], flag, signs[b])
