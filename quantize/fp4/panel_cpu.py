"""Scale search and error feedback of FP4 panels on the CPU (numba): sixteen output rows side by side in vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

from ..simd.memory import load, store
from ..simd.tiles import in_threads, inline, part_of
from ..simd.vectors import added_bits, e2m1, filled, larger, masked_bits, where

if TYPE_CHECKING:
    from ..integer.panel import Panel
    from ..simd.typed import Floats, Integers, Lanes, Number, Vector
    from .grid import Fp4Grid

TILE = 16
LANES = (0,) * TILE
ZERO, ONE, TWO, TWELVE = np.float32(0), np.float32(1), np.float32(2), np.float32(12)
HUGE, TINY = np.float32(3e38), np.float32(2.0**-100)


def round_columns(grid: Fp4Grid, panel: Panel, importance: Tensor, scales: Tensor, search: bool) -> None:
    """As `grid.round_columns`; importance [E, P] weighs squared errors."""
    experts, _, outputs = panel.part.shape
    tiles = -(-outputs // TILE)
    feedback = panel.triangle is not None
    triangle = panel.triangle.contiguous() if panel.triangle is not None else torch.zeros(1, 1, 1)
    errors = panel.errors if panel.errors is not None else torch.zeros(1, 1, 1)
    part, columns, codes = (t.numpy() for t in (panel.part, panel.columns, panel.codes))
    given = (triangle.numpy(), importance.numpy(), scales.numpy())
    tried = (grid.group_size, np.float32(2.0 ** (23 - grid.mantissa)), grid.below, grid.above)

    def work(first: int, stop: int) -> None:
        _round(first, stop, part, columns, *given, codes, errors.numpy(), *tried, search, feedback, LANES)

    in_threads(work, experts * tiles, part_of(experts * tiles, 1))


@inline
def _base(held: Floats, first: int, group: int, unit: Number, ls: Lanes):
    """The scale [L] that brings the largest of the rows first .. first + group of held [P, L] to the last level."""
    most = filled(TWELVE * TINY, ls)
    for k in range(first, first + group):
        most = larger(most, abs(load(held, k * len(ls), ls)))
    return masked_bits(most / TWELVE, -unit)


@inline
def _search(held: Floats, first: int, weights: Floats, group: int, unit: Number, below: int, above: int, ls: Lanes):
    """The best scales [L] of a group's rows rounded as they are; weights [P]."""
    base = _base(held, first, group, unit, ls)
    best, scale = filled(HUGE, ls), base
    for step in range(-below, above + 1):
        tried = added_bits(base, np.float32(step) * unit)
        inverse = ONE / tried
        cross, square = filled(ZERO, ls), filled(ZERO, ls)
        for k in range(first, first + group):
            x = load(held, k * len(ls), ls)
            code = e2m1(x * inverse)
            weighted = weights[k] * code
            cross = cross + weighted * x
            square = square + weighted * code
        error = tried * (tried * square - TWO * cross)
        better = error < best
        best, scale = where(better, error, best), where(better, tried, scale)
    return scale


@inline
def _search_feeding(
    held: Floats, plain: Floats, tried: Floats, first: int, weights: Floats, lower: Floats, group: int, unit: Number,
    below: int, above: int, ls: Lanes,
):  # fmt: skip
    """The same of rows that feed their errors on, among each other; plain [P, L] as they came, tried [group, L]."""
    base = _base(held, first, group, unit, ls)
    best, scale = filled(HUGE, ls), base
    for step in range(-below, above + 1):
        now = added_bits(base, np.float32(step) * unit)
        inverse = ONE / now
        for k in range(group):
            store(tried, k * len(ls), load(held, (first + k) * len(ls), ls))
        total = filled(ZERO, ls)
        for k in range(group - 1, -1, -1):
            x = load(tried, k * len(ls), ls)
            value = e2m1(x * inverse) * now
            total = total + weights[first + k] * (x - value) * (x - value)
            error = load(plain, (first + k) * len(ls), ls) - value
            for j in range(k):
                store(tried, j * len(ls), load(tried, j * len(ls), ls) + error * lower[first + k, first + j])
        better = total < best
        best, scale = where(better, total, best), where(better, now, scale)
    return scale


@inline
def _feed(held: Floats, plain: Floats, error: Floats, k: int, value: Vector, lower: Floats, ls: Lanes):
    """Feed the error of row k to the rows before it; it is kept in the first row of `error`."""
    off = load(plain, k * len(ls), ls) - value
    store(error, 0, off)
    for j in range(k):
        store(held, j * len(ls), load(held, j * len(ls), ls) + off * lower[k, j])


# Of arrays however they lie: one compilation for slices and whole ones.
_CUBE = "float32[:, :, :]"
_SIGNATURE = (
    f"void(int64, int64, {_CUBE}, {_CUBE}, {_CUBE}, float32[:, :], {_CUBE}, int8[:, :, :], {_CUBE}, "
    f"int64, float32, int64, int64, boolean, boolean, UniTuple(int64, {TILE}))"
)


@numba.njit(_SIGNATURE, cache=True, fastmath=True, nogil=True, error_model="numpy")
def _round(
    first: int,
    stop: int,
    part: Floats,
    columns: Floats,
    triangle: Floats,
    importance: Floats,
    scales: Floats,
    codes: Integers,
    errors: Floats,
    group: int,
    unit: Number,
    below: int,
    above: int,
    search: bool,
    feedback: bool,
    ls: Lanes,
):
    """Tiles first .. stop: part, columns, codes, errors [E, P, O], triangle [E, P, P], scales [E, P/group, O].

    Errors go to all columns of the panel that are still to come.
    """
    _, count, outputs = part.shape
    tiles = -(-outputs // TILE)
    held, plain = np.zeros((count, TILE), np.float32), np.zeros((count, TILE), np.float32)
    scale, tried = np.ones(TILE, np.float32), np.zeros((group, TILE), np.float32)
    for p in range(first, stop):
        e, start = p // tiles, p % tiles * TILE
        end = min(start + TILE, outputs)
        held[:, : end - start] = part[e, :, start:end]
        plain[:, : end - start] = columns[e, :, start:end]
        for g in range(count // group - 1, -1, -1):
            if not search:
                scale[: end - start] = scales[e, g, start:end]
            elif feedback:
                given = (importance[e], triangle[e], group, unit, below, above, ls)
                store(scale, 0, _search_feeding(held, plain, tried, g * group, *given))
            else:
                store(scale, 0, _search(held, g * group, importance[e], group, unit, below, above, ls))
            scales[e, g, start:end] = scale[: end - start]
            for k in range((g + 1) * group - 1, g * group - 1, -1):
                level = e2m1(load(held, k * TILE, ls) * (ONE / load(scale, 0, ls)))
                store(tried, 0, level)
                for i in range(end - start):
                    codes[e, k, start + i] = np.int8(tried[0, i])
                if feedback:
                    _feed(held, plain, tried, k, level * load(scale, 0, ls), triangle[e], ls)
                    errors[e, k, start:end] = tried[0, : end - start]
        if feedback:
            part[e, :, start:end] = held[:, : end - start]
