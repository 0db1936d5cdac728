"""`columns` on the CPU (numba): error feedback from the last column to the first, and coordinate descent.

Same arithmetic as `columns.sweep_inner` and `columns.descend_inner`; sums run in another order. Tensors
are [c, E, R], columns first: TILE neighbouring rows are held in the cache and go through all columns together.
`minimum` is None or an array, `middles` None (whole-numbered levels) or what lies between the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numba
import numpy as np
from torch import Tensor

from ...simd.memory import load, store
from ...simd.tiles import in_threads, part_of
from ..types import GGMLType
from .grid import FORMS

if TYPE_CHECKING:
    from ...simd.typed import Bits, Floats, Lanes, Number
    from .columns import Block

TILE = 16  # rows that are taken together: one vector
LANES = (0,) * TILE
ZERO = np.float32(0)
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@lru_cache
def levels_of(kind: GGMLType) -> tuple[np.ndarray, np.ndarray | None, np.float32]:
    """(levels [L] float32, middles [L - 1] float32 of uneven levels, the lowest that is written)."""
    form = FORMS[kind]
    levels = np.array(form.levels, np.float32)
    return levels, None if form.uniform else (levels[1:] + levels[:-1]) / 2, np.float32(form.lowest)


@_jit
def _add_scaled(held: Floats, j: int, other: Floats, factor: Number, lanes: Lanes):
    """held[j] += factor * other, both of as many columns as there are lanes."""
    at = j * len(lanes)
    store(held, at, load(held, at, lanes) + factor * load(other, 0, lanes))


@_jit
def _round(y: Number, step: Number, levels: Floats, middles: Floats | None, lowest: Number):
    """Code and value of the level nearest to y, both in units of the step given."""
    scaled = y / step if step != ZERO else ZERO
    if middles is None:
        level = min(max(np.rint(scaled), lowest), levels[-1])
        return np.uint8(level - levels[0]), step * level
    code = 0
    for middle in middles:
        code += scaled > middle
    return np.uint8(code), step * levels[code]


@_jit
def _sweep(
    first: int,
    stop: int,
    target: Floats,
    weight: Floats,
    decoded: Floats,
    step: Floats,
    minimum: Floats | None,
    codes: Bits,
    lower: Floats,
    levels: Floats,
    middles: Floats | None,
    lowest: Number,
    lanes: Lanes,
):
    """Tiles first .. stop. target .. minimum [c, E, R]; codes uint8; lower [E, c, c]; TILE lanes."""
    columns, _, rows = target.shape
    tiles = -(-rows // TILE)
    held, error = np.zeros((columns, TILE), np.float32), np.zeros(TILE, np.float32)
    for p in range(first, stop):
        e, start = p // tiles, p % tiles * TILE
        width = min(TILE, rows - start)
        held[:, :width] = target[:, e, start : start + width]
        for k in range(columns - 1, -1, -1):
            for i in range(width):
                low = ZERO if minimum is None else minimum[k, e, start + i]
                code, value = _round(held[k, i] + low, step[k, e, start + i], levels, middles, lowest)
                value -= low
                codes[k, e, start + i], decoded[k, e, start + i] = code, value
                error[i] = weight[k, e, start + i] - value
            for j in range(k):
                _add_scaled(held, j, error, lower[e, k, j], lanes)


@_jit
def _descend(
    first: int,
    stop: int,
    pull: Floats,
    decoded: Floats,
    step: Floats,
    minimum: Floats | None,
    codes: Bits,
    moments: Floats,
    levels: Floats,
    middles: Floats | None,
    lowest: Number,
    lanes: Lanes,
):
    """Tiles first .. stop. pull, decoded, step, minimum [c, E, R]; codes uint8; moments [E, c, c]; TILE lanes."""
    columns, _, rows = pull.shape
    tiles = -(-rows // TILE)
    held, change = np.zeros((columns, TILE), np.float32), np.zeros(TILE, np.float32)
    for p in range(first, stop):
        e, start = p // tiles, p % tiles * TILE
        width = min(TILE, rows - start)
        held[:, :width] = pull[:, e, start : start + width]
        for k in range(columns - 1, -1, -1):
            diagonal = moments[e, k, k]
            for i in range(width):
                low, before = ZERO if minimum is None else minimum[k, e, start + i], decoded[k, e, start + i]
                wanted = before + held[k, i] / diagonal
                code, value = _round(wanted + low, step[k, e, start + i], levels, middles, lowest)
                value -= low
                codes[k, e, start + i], decoded[k, e, start + i] = code, value
                change[i] = before - value
            for j in range(k):
                _add_scaled(held, j, change, moments[e, k, j], lanes)


def sweep_columns(block: Block, target: Tensor, weight: Tensor, decoded: Tensor, lower: Tensor) -> None:
    """As `columns.sweep_columns`; `target` stays as it is."""
    arrays = [_numpy(t) for t in (target, weight, decoded, block.step, block.minimum, block.codes)]
    _in_tiles(_sweep, target, *arrays, lower.contiguous().numpy(), *levels_of(block.grid.kind), LANES)


def descend_columns(block: Block, pull: Tensor, decoded: Tensor, moments: Tensor) -> None:
    """As `columns.descend_columns`; `pull` stays as it is."""
    arrays = [_numpy(t) for t in (pull.contiguous(), decoded, block.step, block.minimum, block.codes)]
    _in_tiles(_descend, pull, *arrays, moments.contiguous().numpy(), *levels_of(block.grid.kind), LANES)


def _numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _in_tiles(kernel: Callable[..., None], shape: Tensor, *arguments: object) -> None:
    """kernel(first, stop, ...) over all tiles, on as many threads as torch uses."""
    _, experts, rows = shape.shape
    count = experts * -(-rows // TILE)
    in_threads(lambda first, stop: kernel(first, stop, *arguments), count, part_of(count, 1))
