"""Search the scales of ggml blocks on the CPU (numba), many sub-blocks side by side in vectors.

1. Each sub-block: the plan's starts, each fitted by least squares to its nearest levels; the best one once more.
2. Each block: the plan's d (and dmin) with the nearest stored integers, by the curvature of each sub-block's error.
3. Levels again at exactly what is stored, integers and d (dmin) refitted to them; the best round is kept.

Levels q at a step s and minimum m leave residuals r. For fixed levels the error of any other step and minimum is a
quadratic form in their differences, whose coefficients are the sums of w r^2, w r, w r q, w q and w q^2 (`sums_at`).
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
from ...simd.vectors import filled, uneven_index, where, within
from .effort import Plan
from .fit_cpu import HUGE, ZERO, Limits, best_real, first_stored, inverse, refit_d, refit_whole, sums_at, whole_in
from .weighted import Found, Weighted

if TYPE_CHECKING:
    from ...simd.typed import Bits, Floats, Integers, Lanes, Number

_CHUNK = 1 << 18  # weights of one call


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


@inline
def _write(
    x: Floats, offset: int, ks: Lanes, inv: Number, shift: Number, limits: Limits, uneven: bool | None, codes: Bits
):
    """The codes of the sub-block that starts at `offset`."""
    y = load(x, offset, ks) * inv + shift
    q = whole_in(y, limits[0], limits[1]) - limits[5] if uneven is None else uneven_index(y)
    store(codes, offset, q)


@numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
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
        s, m, q1, qq, w1 = best_real(xt, wt, ks, ls, tries, refits, limits, minimum, uneven)
        d, dmin, steps, minimums = first_stored(s, m, q1, qq, w1, ends, limits, subs, minimum)
        best, best_d, best_dmin, best_steps, best_minimums = filled(HUGE, ls), d, dmin, steps, minimums
        for n in range(rounds + 1):
            sums = sums_at(xt, wt, ks, d * steps, dmin * minimums, limits, minimum, uneven)
            error = within(sums[0], subs, "fadd")
            better = error < best
            best = where(better, error, best)
            best_d, best_dmin = where(better, d, best_d), where(better, dmin, best_dmin)
            best_steps, best_minimums = where(better, steps, best_steps), where(better, minimums, best_minimums)
            if n < rounds:
                if limits[3] != ZERO:
                    (_, _, steps, minimums), sums = refit_whole((d, dmin, steps, minimums), sums, w1, limits, minimum)
                d, dmin = refit_d((d, dmin, steps, minimums), sums, w1, subs, minimum)
        per_step = inverse(best_d * best_steps)
        store(inv, 0, per_step)
        store(shift, 0, best_dmin * best_minimums * per_step)
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
