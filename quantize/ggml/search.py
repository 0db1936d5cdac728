"""Weighted search of the scales of a ggml block: the step (and minimum) of each sub-block, then their stored integers.

All tensors are laid out [S, K, ...]: S sub-blocks of a block, K columns of a sub-block, then blocks and rows, so that sums
run over leading axes and everything else is elementwise. For given levels q the error of the values s * q - m is, per
sub-block, a quadratic form in (s, m) whose coefficients are the weighted `Sums`: candidates are compared, and the best real
(s, m) of a candidate found, without a second pass over the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import FORMS, Form, Grid
from .types import GGMLType

_TINY = 1e-30
_HALF_MAX = 65504.0
# By how many levels a candidate stretches the range; then how often step and levels are fitted to each other.
STRETCHES: dict[GGMLType, tuple[float, ...]] = {}
_STRETCH = (-0.6, -0.2, 0.2, 0.6)
_REFITS = 1
_ROUNDS = 2
_SUPERS = (0.0, -0.5, 0.5, -1.5, 1.5, -3.0, 3.0, -6.0)


@dataclass(frozen=True)
class Sums:
    """Weighted sums over a sub-block [S, ...]: of 1, x and, for levels q, of q, q^2, x q."""

    w: Tensor
    x: Tensor
    q: Tensor
    qq: Tensor
    xq: Tensor


def levels_of(y: Tensor, form: Form) -> Tensor:
    """The levels (float32) nearest to `y`."""
    if form.uniform:
        return y.round().clamp(form.lowest, form.levels[-1])
    table = torch.tensor(form.levels, dtype=torch.float32, device=y.device)
    return table[torch.bucketize(y, (table[1:] + table[:-1]) / 2, out_int32=True)]


def sums_of(q: Tensor, x: Tensor, w: Tensor, wx: Tensor) -> Sums:
    wq = w * q
    return Sums(w.sum(1), wx.sum(1), wq.sum(1), (wq * q).sum(1), (wx * q).sum(1))


def solve(s: Sums, minimum: bool, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Best real (step, minimum) for the levels of the sums, and by how much they lower the error below sum w x^2."""
    alone = s.xq / s.qq.clamp(min=_TINY)
    zero = torch.zeros_like(alone)
    if not minimum:
        return alone, zero, alone * s.xq
    det = s.qq * s.w - s.q * s.q
    ok = det > 1e-6 * s.qq * s.w
    det = torch.where(ok, det, torch.ones_like(det))
    step = (s.xq * s.w - s.q * s.x) / det
    m = (s.xq * s.q - s.qq * s.x) / det
    gain = step * s.xq - m * s.x
    ok = ok & (step > 0)
    if not signed:
        ok = ok & (m >= 0)
    return torch.where(ok, step, alone), torch.where(ok, m, zero), torch.where(ok, gain, alone * s.xq)


def ratio(x: Tensor, s: Tensor) -> Tensor:
    """1 / s with 0 for 0."""
    return torch.where(s == 0, torch.zeros_like(s), 1 / torch.where(s == 0, torch.ones_like(s), s))


def inverse(s: Tensor) -> Tensor:
    return torch.where(s == 0, torch.zeros_like(s), 1 / torch.where(s == 0, torch.ones_like(s), s))


def starts(x: Tensor, form: Form, stretches: tuple[float, ...]):
    """(inverse step, minimum) candidates."""
    top = form.levels[-1]
    bottom = form.lowest
    lo, hi = x.amin(1), x.amax(1)
    if form.minimums is not None:
        if form.minimums > 0:
            lo = lo.clamp(max=0)
        span = inverse((hi - lo).clamp(min=0))
        for t in stretches:
            yield (top + t) * span, -lo
    else:
        big = torch.where(-lo > hi, lo, hi)
        zero = torch.zeros_like(lo)
        inv = inverse(big)
        for t in stretches:
            yield (bottom - t) * inv, zero
        if -bottom > top:
            for t in stretches:
                if -0.4 < t < 1:
                    yield (top + t) * inv, zero


def best_real(x, w, wx, form: Form, stretches, refits):
    minimum = form.minimums is not None
    signed = form.minimums == 0
    best = None

    def keep(best, new):
        if best is None:
            return new
        better = new[2] > best[2]
        return tuple(torch.where(better, n, b) for n, b in zip(new, best, strict=True))

    sw, sx = w.sum(1), wx.sum(1)

    def trial(inv, m):
        q = levels_of(((x + m.unsqueeze(1)) if minimum else x) * inv.unsqueeze(1), form)
        wq = w * q
        s = Sums(sw, sx, wq.sum(1) if minimum else sx, (wq * q).sum(1), (wx * q).sum(1))
        return (*solve(s, minimum, signed), s.q, s.qq, s.xq)

    for inv, m in starts(x, form, stretches):
        best = keep(best, trial(inv, m))
    for _ in range(refits):
        best = keep(best, trial(inverse(best[0]), best[1]))
    return best[0], best[1], Sums(sw.expand_as(sx), sx, *best[3:])


def half(t: Tensor) -> Tensor:
    return t.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def round_super(v: Tensor, curvature: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """d and integers T so that d * T is near v [S, ...], weighted by curvature."""
    if low < 0:
        index = v.abs().argmax(0, keepdim=True)
        big = v.gather(0, index)[0]
        ends = [low - t for t in _SUPERS] + ([] if low < -64 else [high + t for t in (0.0, 0.5, -0.5)])
    else:
        big = v.amax(0)
        ends = [high + t for t in _SUPERS if high + t > 0]
    best_d = best_t = best_e = None
    for end in ends:
        d = half(big / end)
        t = (v * inverse(d)).round().clamp(low, high)
        e = (curvature * (d * t - v) ** 2).sum(0)
        if best_e is None:
            best_d, best_t, best_e = d, t, e
        else:
            better = e < best_e
            best_d, best_t, best_e = (
                torch.where(better, d, best_d),
                torch.where(better, t, best_t),
                torch.where(better, e, best_e),
            )
    return best_d, best_t


def err(s: Sums, step, m):
    return -2 * step * s.xq + 2 * m * s.x + step * step * s.qq - 2 * step * m * s.q + m * m * s.w


def search_laid_out(x: Tensor, w: Tensor, kind: GGMLType, stretches=None, refits=None, rounds=None):
    form = FORMS[kind]
    wx = w * x
    step, m, sums = best_real(x, w, wx, form, stretches or _STRETCH, _REFITS if refits is None else refits)
    rounds = _ROUNDS if rounds is None else rounds
    minimum = form.minimums is not None
    sw = sums.w
    M = T = dmin = None
    if form.steps is None:
        d = half(step[0])
        T = torch.ones_like(step)
        if minimum:
            dmin = half(m[0])
            M = torch.ones_like(m)
    else:
        curv = sums.qq - sums.q * sums.q * inverse(sw) if minimum else sums.qq
        d, T = round_super(step, curv.clamp(min=0) + _TINY, *form.steps)
        if minimum:
            m = ((d * T * sums.q - sums.x) * inverse(sw)).clamp(min=0)
            dmin, M = round_super(m, sw, 0, form.minimums)
    best = None
    for r in range(rounds + 1):
        es = d * T
        em = dmin * M if minimum else None
        y = x + em.unsqueeze(1) if minimum else x
        q = levels_of(y * inverse(es).unsqueeze(1), form)
        wq = w * q
        s = Sums(sw, sums.x, wq.sum(1) if minimum else sums.x, (wq * q).sum(1), (wx * q).sum(1))
        zero = torch.zeros_like(es)
        e = err(s, es, em if minimum else zero).sum(0)
        new = (e, d, T) + ((dmin, M) if minimum else ())
        if best is None:
            best = new
        else:
            better = e < best[0]
            best = tuple(torch.where(better, n, b) for n, b in zip(new, best))
        if r == rounds:
            break
        # re-fit integers, then d, dmin
        if form.steps is not None:
            T = (((s.xq + em * s.q) if minimum else s.xq) * inverse(s.qq) * inverse(d)).round().clamp(*form.steps)
            if minimum:
                M = ((d * T * s.q - s.x) * inverse(s.w) * inverse(dmin)).round().clamp(0, form.minimums)
        if minimum:
            a11 = (T * T * s.qq).sum(0)
            a12 = (T * M * s.q).sum(0)
            a22 = (M * M * s.w).sum(0)
            b1 = (T * s.xq).sum(0)
            b2 = -(M * s.x).sum(0)
            det = a11 * a22 - a12 * a12
            ok = det > 1e-6 * a11 * a22
            det = torch.where(ok, det, torch.ones_like(det))
            nd = (b1 * a22 + a12 * b2) / det
            nm = (a11 * b2 + a12 * b1) / det
            ok = ok & (nd > 0)
            d = half(torch.where(ok, nd, d))
            dmin = half(torch.where(ok, nm, dmin))
        else:
            a = (T * T * s.qq).sum(0)
            d = torch.where(a > 0, half((T * s.xq).sum(0) * inverse(a)), d)
    return best


def search_grid(rows: Tensor, kind: GGMLType, importance: Tensor | None, **kw) -> Grid:
    form = FORMS[kind]
    block = kind.block_columns
    R, n = rows.shape
    x = rows.view(R, n // block, block // form.sub, form.sub).permute(2, 3, 1, 0).contiguous()
    if importance is None:
        w = torch.ones(1, 1, 1, 1)
        w = w.expand(x.shape[0], x.shape[1], 1, 1)
    else:
        w = importance / importance.mean()
        w = w.view(-1, n // block, block // form.sub, form.sub).permute(2, 3, 1, 0).contiguous()
    best = search_laid_out(x, w, kind, **kw)
    back = lambda t: t.permute(2, 1, 0).reshape(R, -1)
    d = best[1].t().half()
    steps = back(best[2]).to(torch.int16) if form.steps else None
    dmin = mins = None
    if form.minimums is not None:
        dmin = best[3].t().half()
        mins = back(best[4]).to(torch.int16) if form.minimums else None
    return Grid(kind, d, dmin, steps, mins)
