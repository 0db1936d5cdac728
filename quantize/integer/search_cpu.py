"""The scale search of `grid` on the CPU (numba): one group after another, the same candidates in the same order.

Codes are taken with a multiplication by 1 / scale here, so that a weight halfway between two codes may fall on the
other one: scales differ from the torch search where two candidates cost the same within rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

from ..simd.tiles import in_threads
from ..simd.vectors import ceil, floor, larger, nearest_whole, smaller

if TYPE_CHECKING:
    from ..simd.typed import Floats, Integers, Number

_CHUNK = 1 << 19  # weights of one call
ZERO, ONE, TWO, TINY, HUGE = (np.float32(v) for v in (0, 1, 2, 1e-38, 3e38))

_jit = numba.njit(cache=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"}, nogil=True, error_model="numpy")


def search_groups(
    groups: Tensor, table: Tensor, span: int, codes: tuple[int, int], ratios: Tensor, kind: str
) -> tuple[Tensor, Tensor | None]:
    """Scales [N] float32 (exact in bfloat16) and zeros [N] int8 (None for symmetric grids) of groups [N, g] float32.

    table [T, P, g] weighs squared errors: group i has row [i // span, i % P]. codes: the smallest and the largest.
    ratios: shares of the range to try. kind: "signed", "positive" or "asymmetric".
    """
    scales, zeros = torch.empty(len(groups)), torch.empty(len(groups), dtype=torch.int8)
    low, high = np.float32(codes[0]), np.float32(codes[1])
    inputs = (groups.contiguous().numpy(), table.contiguous().numpy(), span, low, high, ratios.numpy())
    out, signed = (scales.numpy(), zeros.numpy()), kind == "signed"

    def work(first: int, last: int) -> None:
        if kind == "asymmetric":
            _asymmetric(first, last, *inputs, *out)
        else:
            _symmetric(first, last, *inputs, signed, out[0])

    in_threads(work, len(groups), max(1, _CHUNK // groups.shape[1]))
    return scales, zeros if kind == "asymmetric" else None


@_jit
def _usable(value: Number):
    """The nearest bfloat16 (ties to even), as float32; 1 in place of zero."""
    bits = np.float32(value).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded = np.uint32(bits).view(np.float32)
    return ONE if rounded == ZERO else rounded


@_jit
def _cost(x: Floats, h: Floats, scale: Number, zero: Number, low: Number, high: Number):
    """The better of `scale` and of the least-squares scale for its codes: (error less the weights' energy, scale)."""
    inverse = ONE / scale
    cross, square = ZERO, ZERO
    least, most = low - zero, high - zero
    for j in range(x.shape[0]):
        code = smaller(larger(nearest_whole(x[j] * inverse), least), most)
        weighted = h[j] * code
        cross += weighted * x[j]
        square += weighted * code
    refit = _usable(cross / max(square, TINY))
    error = scale * (scale * square - TWO * cross)
    refitted = refit * (refit * square - TWO * cross)
    if refitted < error:
        return refitted, refit
    return error, scale


@_jit
def _symmetric(
    first: int,
    last: int,
    groups: Floats,
    table: Floats,
    span: int,
    low: Number,
    high: Number,
    ratios: Floats,
    signed: bool,
    scales: Floats,
):
    for i in range(first, last):
        x, h = groups[i], table[i // span, i % table.shape[1]]
        extreme = ZERO
        for value in x:
            if abs(value) > abs(extreme):
                extreme = value
        start = extreme / low if signed else abs(extreme) / (np.float32(0.5) * (high - low))
        best, scale = _cost(x, h, _usable(start), ZERO, low, high)
        for ratio in ratios:
            for sign in (ONE, -ONE):
                if sign > ZERO or signed:
                    error, chosen = _cost(x, h, _usable(start * (ratio * sign)), ZERO, low, high)
                    if error < best:
                        best, scale = error, chosen
        scales[i] = scale


@_jit
def _asymmetric(
    first: int,
    last: int,
    groups: Floats,
    table: Floats,
    span: int,
    low: Number,
    high: Number,
    ratios: Floats,
    scales: Floats,
    zeros: Integers,
):
    for i in range(first, last):
        x, h = groups[i], table[i // span, i % table.shape[1]]
        least, most = ZERO, ZERO
        for value in x:
            least, most = min(least, value), max(most, value)
        best, scale, zero = HUGE, _usable((most - least) / (high - low)), ZERO
        for ratio in ratios:
            tried = _usable((most - least) * (ratio / (high - low)))
            middle = low - least * ratio / tried
            for point in (floor(middle), ceil(middle)):
                point = smaller(larger(point, low), high)
                error, chosen = _cost(x, h, tried, point, low, high)
                if error < best:
                    best, scale, zero = error, chosen, point
        scales[i], zeros[i] = scale, np.int8(zero)
