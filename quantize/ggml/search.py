"""Weighted search of a ggml block's scales in torch: real steps of the sub-blocks, then the integers that are stored.

Blocks are laid out [P, S, K]: P blocks, S sub-blocks, K columns. For given levels q the error of the values s * q - m is,
per sub-block, a quadratic form in (s, m) whose coefficients are weighted sums (`Sums`): candidates are compared, and the
best real (s, m) of a candidate found, without a second pass over the weights.

1. Each sub-block: several stretches of its range as candidates, the best refitted (levels and least squares in turn).
2. Each block: several d (and dmin) with the nearest stored integers, by the curvature of that quadratic form.
3. Levels again at exactly what is stored, integers and d (dmin) refitted, the best round kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import need
from .effort import Effort
from .grid import Form, exponent_value

_TINY = 1e-30
_HALF_MAX = 65504.0


@dataclass(frozen=True)
class Found:
    """What is stored of P blocks: d, dmin [P] float16 values (d: MXFP4's exponent), steps, minimums [P, S], codes [P, S, K]."""

    d: Tensor
    dmin: Tensor | None
    steps: Tensor
    minimums: Tensor | None
    codes: Tensor


@dataclass(frozen=True)
class Sums:
    """Weighted sums [P, S] over a sub-block: of 1 and x, and for levels q of q, q^2 and x q."""

    w: Tensor
    x: Tensor
    q: Tensor
    qq: Tensor
    xq: Tensor

    def error(self, step: Tensor, minimum: Tensor | None) -> Tensor:
        """sum w (x - value)^2 [P, S], less the constant sum w x^2."""
        out = step * (step * self.qq - 2 * self.xq)
        if minimum is not None:
            out = out + minimum * (2 * self.x + minimum * self.w - 2 * step * self.q)
        return out


@dataclass(frozen=True)
class Problem:
    """P blocks of weights x and importance w, both [P, S, K]."""

    x: Tensor
    w: Tensor
    form: Form

    def levels(self, inverse_step: Tensor, minimum: Tensor | None) -> Tensor:
        """The levels (float32) [P, S, K] nearest to x at 1/step and minimum [P, S]."""
        x = self.x if minimum is None else self.x + minimum.unsqueeze(-1)
        return nearest_level_values(x * inverse_step.unsqueeze(-1), self.form)

    def sums(self, q: Tensor) -> Sums:
        """The sums of levels q."""
        wx, wq = self.w * self.x, self.w * q
        return Sums(self.w.sum(-1), wx.sum(-1), wq.sum(-1), (wq * q).sum(-1), (wx * q).sum(-1))


def nearest_level_values(y: Tensor, form: Form) -> Tensor:
    """The levels themselves (float32) nearest to `y`."""
    if form.uniform:
        return y.round().clamp(form.lowest, form.levels[-1])
    out = torch.full_like(y, form.levels[0])
    for below, level in zip(form.levels, form.levels[1:], strict=False):
        out = torch.where(y > (below + level) / 2, float(level), out)
    return out


def inverse(t: Tensor) -> Tensor:
    """1 / t, and 0 for 0."""
    return torch.where(t == 0, 0.0, 1 / torch.where(t == 0, 1.0, t))


def half(t: Tensor) -> Tensor:
    """Rounded to a finite float16 value."""
    return t.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16).float()


def find(problem: Problem, effort: Effort) -> Found:
    """The best scales and codes found."""
    step, minimum, sums = _real(problem, effort)
    scales = _stored(step, minimum, sums, problem.form, effort)
    q = problem.levels(inverse(scales.step), scales.minimum)
    for _ in range(effort.rounds):
        sums = problem.sums(q)
        refit = scales.refit(sums, problem.form)
        new_q = problem.levels(inverse(refit.step), refit.minimum)
        before = sums.error(scales.step, scales.minimum).sum(-1)
        after = problem.sums(new_q).error(refit.step, refit.minimum).sum(-1)
        better = after < before
        scales = refit.where(better, scales)
        q = torch.where(better[:, None, None], new_q, q)
    return Found(scales.d, scales.dmin, scales.steps, scales.minimums, code_of(q, problem.form))


def code_of(q: Tensor, form: Form) -> Tensor:
    """The codes (uint8) of levels given as float32."""
    if form.uniform:
        return (q - form.levels[0]).to(torch.uint8)
    out = torch.zeros_like(q)
    for below, level in zip(form.levels, form.levels[1:], strict=False):
        out = out + (q > (below + level) / 2)
    return out.to(torch.uint8)


def find_exponent(problem: Problem) -> Found:
    """MXFP4: the best of the exponents around the largest magnitude."""
    largest = problem.x.abs().amax(-1)[:, 0]
    # The biased exponent of the largest magnitude, less 2, makes it 8 to 16 steps; the end level is 12.
    middle = ((largest.view(torch.int32) >> 23) - 2).clamp(1, 253)
    best_e, best_q, best = middle, torch.zeros_like(problem.x), torch.full_like(largest, float("inf"))
    for offset in (-1, 0, 1):
        step = exponent_value(middle + offset)[:, None]
        q = problem.levels(1 / step, None)
        error = problem.sums(q).error(step, None)[:, 0]
        better = error < best
        best_e = torch.where(better, middle + offset, best_e)
        best_q = torch.where(better[:, None, None], q, best_q)
        best = torch.where(better, error, best)
    return Found(best_e, None, torch.ones_like(best)[:, None], None, code_of(best_q, problem.form))


def _real(problem: Problem, effort: Effort) -> tuple[Tensor, Tensor | None, Sums]:
    """The best real step and minimum [P, S] found, and the sums of their levels."""
    form = problem.form
    best: tuple[Tensor, ...] | None = None
    start = _starts(problem, effort)
    for attempt in range(effort.candidates(form) + effort.refits):
        if attempt < effort.candidates(form):
            inv, m = next(start)
        else:
            assert best is not None
            inv, m = inverse(best[1]), best[2]
        sums = problem.sums(problem.levels(inv, m if form.minimums is not None else None))
        step, m, gain = _solve(sums, form)
        new = (gain, step, m, sums.q, sums.qq, sums.xq)
        if best is None:
            best = new
        else:
            better = gain > best[0]
            best = tuple(torch.where(better, n, b) for n, b in zip(new, best, strict=True))
    assert best is not None
    w, x = problem.w.sum(-1), (problem.w * problem.x).sum(-1)
    return best[1], (None if form.minimums is None else best[2]), Sums(w, x, *best[3:])


def _starts(problem: Problem, effort: Effort) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates: 1/step and minimum [P, S]."""
    form, low, high = problem.form, problem.x.amin(-1), problem.x.amax(-1)
    if form.minimums is None:
        largest = torch.where(-low > high, low, high)
        inv, none = inverse(largest), torch.zeros_like(low)
        for t in effort.stretches:
            yield (form.lowest - t) * inv, none
        if -form.lowest > form.levels[-1]:
            for t in effort.other_stretches:
                yield (form.levels[-1] + t) * inv, none
        return
    if form.minimums > 0:
        low = low.clamp(max=0)
    inv = inverse((high - low).clamp(min=0))
    for t, shift in effort.range_stretches:
        # `shift` is the share of the cut-off range that comes off the lower end, in levels
        yield (form.levels[-1] + t) * inv, -(low + shift * (high - low) / form.levels[-1])


def _solve(s: Sums, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """The best real (step, minimum) for the levels of the sums, and by how much it lowers the error below sum w x^2."""
    step = s.xq / s.qq.clamp(min=_TINY)
    gain = step * s.xq
    zero = torch.zeros_like(step)
    if form.minimums is None:
        return step, zero, gain
    det = s.qq * s.w - s.q * s.q
    usable = det > 1e-6 * s.qq * s.w
    det = torch.where(usable, det, 1.0)
    both = (s.xq * s.w - s.q * s.x) / det
    minimum = (s.xq * s.q - s.qq * s.x) / det
    usable = usable & (both > 0)
    if form.minimums > 0:
        usable = usable & (minimum >= 0)
    gain = torch.where(usable, both * s.xq - minimum * s.x, gain)
    return torch.where(usable, both, step), torch.where(usable, minimum, zero), gain


@dataclass(frozen=True)
class Scales:
    """Stored scales as float32: d, dmin [P]; steps, minimums [P, S] whole numbers (1 where the type stores none)."""

    d: Tensor
    dmin: Tensor | None
    steps: Tensor
    minimums: Tensor | None

    @property
    def step(self) -> Tensor:
        return self.d[:, None] * self.steps

    @property
    def minimum(self) -> Tensor | None:
        return None if self.dmin is None or self.minimums is None else self.dmin[:, None] * self.minimums

    def where(self, mask: Tensor, other: Scales) -> Scales:
        """These where mask [P], the other's elsewhere."""
        d, steps = torch.where(mask, self.d, other.d), torch.where(mask[:, None], self.steps, other.steps)
        if self.dmin is None or self.minimums is None:
            return Scales(d, None, steps, None)
        dmin, minimums = torch.where(mask, self.dmin, need(other.dmin)), need(other.minimums)
        return Scales(d, dmin, steps, torch.where(mask[:, None], self.minimums, minimums))

    def refit(self, s: Sums, form: Form) -> Scales:
        """Whole numbers, then d and dmin, by least squares for the levels of the sums."""
        steps, minimums, minimum = self.steps, self.minimums, self.minimum
        if form.steps is not None:
            wanted = s.xq if minimum is None else s.xq + minimum * s.q
            steps = (wanted * inverse(s.qq * self.d[:, None])).round().clamp(*form.steps)
        if minimum is None or minimums is None or self.dmin is None:
            d = half((steps * s.xq).sum(-1) * inverse((steps * steps * s.qq).sum(-1)))
            return Scales(d, None, steps, None)
        if form.minimums:
            wanted = self.d[:, None] * steps * s.q - s.x
            minimums = (wanted * inverse(s.w * self.dmin[:, None])).round().clamp(0, form.minimums)
        d, dmin = _both(s, steps, minimums, self.d, self.dmin)
        return Scales(d, dmin, steps, minimums)


def _both(s: Sums, steps: Tensor, minimums: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin [P] by least squares; as they were where that has no solution."""
    a, b, c = ((t * u).sum(-1) for t, u in ((steps**2, s.qq), (steps * minimums, s.q), (minimums**2, s.w)))
    right, left = (steps * s.xq).sum(-1), -(minimums * s.x).sum(-1)
    det = a * c - b * b
    usable = det > 1e-6 * a * c
    det = torch.where(usable, det, 1.0)
    new_d, new_dmin = (right * c + b * left) / det, (a * left + b * right) / det
    usable = usable & (new_d > 0)
    return half(torch.where(usable, new_d, d)), half(torch.where(usable, new_dmin, dmin))


def _stored(step: Tensor, minimum: Tensor | None, s: Sums, form: Form, effort: Effort) -> Scales:
    """Stored scales near the real ones."""
    if form.steps is None:
        ones = torch.ones_like(step)
        if minimum is None:
            return Scales(half(step[:, 0]), None, ones, None)
        return Scales(half(step[:, 0]), half(minimum[:, 0]), ones, ones)
    curvature = s.qq if minimum is None else (s.qq - s.q * s.q * inverse(s.w)).clamp(min=0)
    d, steps = _whole(step, curvature, form.steps, effort)
    if minimum is None or form.minimums is None:
        return Scales(d, None, steps, None)
    wanted = ((d[:, None] * steps * s.q - s.x) * inverse(s.w)).clamp(min=0)
    dmin, minimums = _whole(wanted, s.w, (0, form.minimums), effort)
    return Scales(d, dmin, steps, minimums)


def _whole(v: Tensor, curvature: Tensor, span: tuple[int, int], effort: Effort) -> tuple[Tensor, Tensor]:
    """d [P] float16 and whole t [P, S] within `span` so that d * t is near v [P, S], errors weighted by curvature."""
    low, high = span
    if low < 0:
        big = v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0]
        ends = [low - t for t in effort.supers] + [high + t for t in effort.supers[:3]]
    else:
        big = v.amax(1)
        ends = [high + t for t in effort.supers if high + t > high / 2]
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for end in ends:
        d = half(big / end)
        t = (v * inverse(d)[:, None]).round().clamp(low, high)
        error = (curvature * (d[:, None] * t - v) ** 2).sum(1)
        if best is None:
            best = error, d, t
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, d, best[1]),
                torch.where(better[:, None], t, best[2]),
            )
    assert best is not None
    return best[1], best[2]
