"""Exhaustive search of the I-quants' codebooks on CPU (numba): the error of many scales at once, and the nearest points.

With a = w*|x|, and P = a.c and Q = w.c^2 for each point c of the codebook, the weighted error at any scale s is
w.x^2 - 2sP + s^2 Q: P and Q are formed once, after which one more scale costs two operations a point. Where the number of minus
signs must be even but is odd, the cheapest weight to turn costs 4s min_i(a_i c_i): P falls by 2 min_i(a_i c_i), still exactly.
Every kernel leaves the constant w.x^2 out. Functions here take NumPy arrays; `iquants_search` has the meaning of the arguments.
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


@intrinsic
def _smaller(context: Any, left: Any, right: Any) -> Any:
    """min() as LLVM's own operation: a loop over numba's `min` of floats is not vectorized (16 times slower here)."""
    signature = types.float32(types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.minnum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(function, arguments, fastmath=("fast",))

    return signature, generate


@numba.njit(cache=True, fastmath=True, nogil=True)
def _products(a, w, points, squares, p, q):  # type: ignore[no-untyped-def]
    """2P and Q of one group for all points [4 or 8, N]."""
    for n in range(p.size):
        p[n] = TWO * (a[0] * points[0, n] + a[1] * points[1, n] + a[2] * points[2, n] + a[3] * points[3, n])
        q[n] = w[0] * squares[0, n] + w[1] * squares[1, n] + w[2] * squares[2, n] + w[3] * squares[3, n]
    if a.size == 8:
        for n in range(p.size):
            p[n] += TWO * (a[4] * points[4, n] + a[5] * points[5, n] + a[6] * points[6, n] + a[7] * points[7, n])
            q[n] += w[4] * squares[4, n] + w[5] * squares[5, n] + w[6] * squares[6, n] + w[7] * squares[7, n]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _turn(a, points, p, turned):  # type: ignore[no-untyped-def]
    """2P when the cheapest sign of each point is turned."""
    for n in range(p.size):
        least = _smaller(_smaller(a[0] * points[0, n], a[1] * points[1, n]), _smaller(a[2] * points[2, n], a[3] * points[3, n]))
        turned[n] = least
    if a.size == 8:
        for n in range(p.size):
            least = _smaller(
                _smaller(a[4] * points[4, n], a[5] * points[5, n]), _smaller(a[6] * points[6, n], a[7] * points[7, n])
            )
            turned[n] = _smaller(least, turned[n])
    for n in range(p.size):
        turned[n] = p[n] - (TWO * TWO) * turned[n]


@numba.njit(cache=True, fastmath=True, nogil=True)
def _least(p, q, scales, out):  # type: ignore[no-untyped-def]
    """Least error of all points at each scale; four scales share the loads. scales: a multiple of four of them."""
    for k in range(0, scales.size, 4):
        s0, s1, s2, s3 = scales[k], scales[k + 1], scales[k + 2], scales[k + 3]
        b0, b1, b2, b3 = HUGE, HUGE, HUGE, HUGE
        for n in range(p.size):
            b0 = _smaller(b0, s0 * q[n] - p[n])
            b1 = _smaller(b1, s1 * q[n] - p[n])
            b2 = _smaller(b2, s2 * q[n] - p[n])
            b3 = _smaller(b3, s3 * q[n] - p[n])
        out[k], out[k + 1], out[k + 2], out[k + 3] = s0 * b0, s1 * b1, s2 * b2, s3 * b3


@numba.njit(cache=True, fastmath=True, nogil=True)
def _nearest(p, q, scale, error):  # type: ignore[no-untyped-def]
    """Index of the least error at one scale; error [N] is scratch, the least error is left in error[index]."""
    best = HUGE
    for n in range(p.size):
        error[n] = scale * q[n] - p[n]
        best = _smaller(best, error[n])
    for n in range(p.size):
        if error[n] <= best:
            return n
    return 0


@numba.njit(cache=True, nogil=True)
def _odd(x):  # type: ignore[no-untyped-def]
    count = 0
    for i in range(x.size):
        count += x[i] < 0
    return count % 2 == 1


@numba.njit(cache=True, fastmath=True, nogil=True)
def scan(x, w, scales, points, squares, parity, out):  # type: ignore[no-untyped-def]
    """Errors [B, S] of blocks x, w [B, shared] at scales [B, S], for types whose points are magnitudes."""
    group, entries, steps = points.shape[0], points.shape[1], scales.shape[1]
    p, q, turned = np.empty(entries, np.float32), np.empty(entries, np.float32), np.empty(entries, np.float32)
    a, plain, other = np.empty(8, np.float32), np.empty((2, steps), np.float32), np.empty((2, steps), np.float32)
    for b in range(x.shape[0]):
        out[b] = 0
        for first in range(0, x.shape[1], 8):
            odd = parity and _odd(x[b, first : first + 8])
            for i in range(8):
                a[i] = abs(x[b, first + i]) * w[b, first + i]
            for half in range(8 // group):
                part = a[half * group : (half + 1) * group]
                start = first + half * group
                _products(part, w[b, start : start + group], points, squares, p, q)
                if not odd or group == 4:
                    _least(p, q, scales[b], plain[half])
                if odd:
                    _turn(part, points, p, turned)
                    _least(turned, q, scales[b], other[half])
            for k in range(steps):
                if group == 8:
                    out[b, k] += other[0, k] if odd else plain[0, k]
                elif odd:
                    out[b, k] += min(plain[0, k] + other[1, k], other[0, k] + plain[1, k])
                else:
                    out[b, k] += plain[0, k] + plain[1, k]


@numba.njit(cache=True, fastmath=True, nogil=True)
def assign(x, w, scale, points, squares, parity, code, signs):  # type: ignore[no-untyped-def]
    """Nearest points code [B, shared/group] and sign bytes [B, shared/8] at one scale a block [B]."""
    group, entries = points.shape[0], points.shape[1]
    p, q = np.empty(entries, np.float32), np.empty(entries, np.float32)
    turned, error = np.empty(entries, np.float32), np.empty(entries, np.float32)
    a, found, cost = np.empty(8, np.float32), np.empty((2, 2), np.int16), np.zeros((2, 2), np.float32)
    for b in range(x.shape[0]):
        for first in range(0, x.shape[1], 8):
            byte = 0
            odd = parity and _odd(x[b, first : first + 8])
            for i in range(8):
                a[i] = abs(x[b, first + i]) * w[b, first + i]
                byte |= (x[b, first + i] < 0) << i
            for half in range(8 // group):
                part = a[half * group : (half + 1) * group]
                start = first + half * group
                _products(part, w[b, start : start + group], points, squares, p, q)
                found[half, 0] = _nearest(p, q, scale[b], error)
                cost[half, 0] = error[found[half, 0]]
                if odd:
                    _turn(part, points, p, turned)
                    found[half, 1] = _nearest(turned, q, scale[b], error)
                    cost[half, 1] = error[found[half, 1]]
            turn = 0
            if group == 4 and cost[0, 0] + cost[1, 1] < cost[0, 1] + cost[1, 0]:
                turn = 1
            for half in range(8 // group):
                chosen = found[half, 1] if odd and half == turn else found[half, 0]
                code[b, first // group + half] = chosen
                if odd and half == turn:
                    least, place = HUGE, 0
                    for i in range(group):
                        price = a[half * group + i] * points[i, chosen]
                        if price < least:
                            least, place = price, half * group + i
                    byte ^= 1 << place
            signs[b, first // 8] = byte


@numba.njit(cache=True, fastmath=True, nogil=True)
def _shifted(x, w, points, squares, delta, p, q):  # type: ignore[no-untyped-def]
    """2P and Q [2, N] of one group of 8 for all points shifted by +delta and by -delta."""
    a, total, weight = np.empty(8, np.float32), np.float32(0), np.float32(0)
    for i in range(8):
        a[i] = x[i] * w[i]
        total += a[i]
        weight += w[i]
    _products(a, w, points, squares, p[0], q[0])
    for n in range(points.shape[1]):
        linear = (
            w[0] * points[0, n] + w[1] * points[1, n] + w[2] * points[2, n] + w[3] * points[3, n]
            + w[4] * points[4, n] + w[5] * points[5, n] + w[6] * points[6, n] + w[7] * points[7, n]
        )  # fmt: skip
        both_p, both_q, shift = p[0, n], q[0, n] + delta * delta * weight, TWO * delta * linear
        p[0, n], p[1, n] = both_p + TWO * delta * total, both_p - TWO * delta * total
        q[0, n], q[1, n] = both_q + shift, both_q - shift


@numba.njit(cache=True, fastmath=True, nogil=True)
def scan_shifted(x, w, scales, points, squares, delta, common, out):  # type: ignore[no-untyped-def]
    """As `scan` for the ternary types: one sign of delta a block (`common`) or one a group."""
    entries, steps = points.shape[1], scales.shape[1]
    p, q = np.empty((2, entries), np.float32), np.empty((2, entries), np.float32)
    least, total = np.empty((2, steps), np.float32), np.empty((2, steps), np.float32)
    for b in range(x.shape[0]):
        total[:] = 0
        for first in range(0, x.shape[1], 8):
            _shifted(x[b, first : first + 8], w[b, first : first + 8], points, squares, delta, p, q)
            for v in range(2):
                _least(p[v], q[v], scales[b], least[v])
            for k in range(steps):
                if common:
                    total[0, k] += least[0, k]
                    total[1, k] += least[1, k]
                else:
                    total[0, k] += min(least[0, k], least[1, k])
        for k in range(steps):
            out[b, k] = min(total[0, k], total[1, k]) if common else total[0, k]


@numba.njit(cache=True, fastmath=True, nogil=True)
def assign_shifted(x, w, scale, points, squares, delta, common, code, minus):  # type: ignore[no-untyped-def]
    """As `assign` for the ternary types: code and minus [B, shared/8]."""
    entries, groups = points.shape[1], x.shape[1] // 8
    p, q, error = np.empty((2, entries), np.float32), np.empty((2, entries), np.float32), np.empty(entries, np.float32)
    found, cost = np.empty((2, groups), np.int16), np.empty((2, groups), np.float32)
    for b in range(x.shape[0]):
        for g in range(groups):
            _shifted(x[b, g * 8 : g * 8 + 8], w[b, g * 8 : g * 8 + 8], points, squares, delta, p, q)
            for v in range(2):
                found[v, g] = _nearest(p[v], q[v], scale[b], error)
                cost[v, g] = error[found[v, g]]
        whole = cost[1].sum() < cost[0].sum()
        for g in range(groups):
            side = whole if common else cost[1, g] < cost[0, g]
            minus[b, g] = side
            code[b, g] = found[1, g] if side else found[0, g]
