"""The grid of a ggml block: value = step * level - minimum, one step (and minimum) per sub-block.

Every K-quant, legacy type, IQ4 type and MXFP4 is such a grid; they differ in the levels and in how steps are stored:

    type                block  sub  levels            step of a sub-block          minimum
    Q8_0                 32     32  -128..127         d (float16)                  -
    Q4_0, Q5_0           32     32  -8..7, -16..15    d                            -
    Q4_1, Q5_1           32     32  0..15, 0..31      d                            -m (float16)
    Q2_K                256     16  0..3              d * 4 bits                   dmin * 4 bits
    Q4_K, Q5_K          256     32  0..15, 0..31      d * 6 bits                   dmin * 6 bits
    Q3_K, Q6_K          256     16  -4..3, -32..31    d * signed 6 or 8 bits       -
    IQ4_NL               32     32  16 uneven levels  d                            -
    IQ4_XS              256     32  the same          d * signed 6 bits            -
    MXFP4                32     32  15 e2m1 levels    2^(e - 128)                  -

Source: dequantize_row_* in ggml-quants.c, ggml-common.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..types import GGMLType

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)  # twice e2m1; the exponent's bias is one less


@dataclass(frozen=True)
class Form:
    """What distinguishes one type's grid.

    sub        columns that share a step
    levels     ascending integers; a code is an index into them
    steps      (lowest, highest) stored integer multiple of d per sub-block, None where the step is d itself
    minimums   highest stored integer multiple of dmin, 0 where dmin itself is the minimum, None without a minimum
    unused     how many of the lowest levels are decoded but never written: the byte -128, which ggml does not write
    """

    sub: int
    levels: tuple[int, ...]
    steps: tuple[int, int] | None = None
    minimums: int | None = None
    unused: int = 0

    @property
    def lowest(self) -> int:
        """The lowest level that an encoder uses."""
        return self.levels[self.unused]

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


FORMS: dict[GGMLType, Form] = {
    GGMLType.Q8_0: Form(32, tuple(range(-128, 128)), unused=1),
    GGMLType.Q4_0: Form(32, tuple(range(-8, 8))),
    GGMLType.Q5_0: Form(32, tuple(range(-16, 16))),
    GGMLType.Q4_1: Form(32, tuple(range(16)), None, 0),
    GGMLType.Q5_1: Form(32, tuple(range(32)), None, 0),
    GGMLType.Q2_K: Form(16, tuple(range(4)), (0, 15), 15),
    GGMLType.Q3_K: Form(16, tuple(range(-4, 4)), (-32, 31)),
    GGMLType.Q4_K: Form(32, tuple(range(16)), (0, 63), 63),
    GGMLType.Q5_K: Form(32, tuple(range(32)), (0, 63), 63),
    GGMLType.Q6_K: Form(16, tuple(range(-32, 32)), (-128, 127)),
    GGMLType.IQ4_NL: Form(32, IQ4_LEVELS),
    GGMLType.IQ4_XS: Form(32, IQ4_LEVELS, (-32, 31)),
    GGMLType.MXFP4: Form(32, MXFP4_LEVELS),
}


@dataclass(frozen=True)
class Grid:
    """The scales of R rows of n columns as they are stored, and the grid they span.

    d         [R, n/block] float16; for MXFP4 uint8, the exponent e of 2^(e - 128)
    dmin      [R, n/block] float16, None without minimums; for Q4_1 and Q5_1 it is -m
    steps     [R, n/sub] int16, None where d is the step
    minimums  [R, n/sub] int16, None where dmin is the minimum or there is none
    """

    kind: GGMLType
    d: Tensor
    dmin: Tensor | None = None
    steps: Tensor | None = None
    minimums: Tensor | None = None

    @property
    def form(self) -> Form:
        """The type's form."""
        return FORMS[self.kind]

    @property
    def columns(self) -> int:
        """n."""
        return self.d.shape[1] * self.kind.block_columns

    def to(self, device: torch.device) -> Grid:
        """The same grid on another device."""
        parts = (None if p is None else p.to(device) for p in (self.dmin, self.steps, self.minimums))
        return Grid(self.kind, self.d.to(device), *parts)

    @cached_property
    def step(self) -> Tensor:
        """[R, n/sub] float32, signed; exactly the factor that ggml multiplies a level with."""
        d = exponent_value(self.d) if self.kind is GGMLType.MXFP4 else self.d.float()
        return d if self.steps is None else _times(d, self.steps)

    @cached_property
    def minimum(self) -> Tensor | None:
        """[R, n/sub] float32, what ggml subtracts; None where the type has none."""
        if self.dmin is None:
            return None
        dmin = self.dmin.float()
        return dmin if self.minimums is None else _times(dmin, self.minimums)

    @cached_property
    def levels(self) -> Tensor:
        """[L] float32, ascending."""
        return torch.tensor(self.form.levels, dtype=torch.float32, device=self.d.device)


def _times(d: Tensor, multiples: Tensor) -> Tensor:
    parts = multiples.shape[1] // d.shape[1]
    return (d.unsqueeze(2) * torch.unflatten(multiples.float(), 1, (-1, parts))).flatten(1)


def exponent_value(exponent: Tensor) -> Tensor:
    """2^(e - 128) float32 of MXFP4's exponent byte, subnormals included. Source: GGML_E8M0_TO_FP32_HALF."""
    e = exponent.to(torch.int32)
    return torch.where(e > 1, (e - 1) << 23, 1 << (21 + e.clamp(max=1))).view(torch.float32)


def nearest_levels(y: Tensor, form: Form) -> Tensor:
    """The codes (uint8) of the levels nearest to `y`, any shape, in units of the step."""
    if form.uniform:
        return (y.round().clamp(form.lowest, form.levels[-1]) - form.levels[0]).to(torch.uint8)
    middles = torch.tensor(form.levels, dtype=torch.float32, device=y.device)
    middles = (middles[1:] + middles[:-1]) / 2
    return torch.bucketize(y, middles).to(torch.uint8)


def nearest(grid: Grid, first: int, values: Tensor) -> Tensor:
    """Codes uint8 [R, c] of the grid points nearest to `values` [R, c] float32 of the columns first .. first + c.

    A sub-block whose step is zero has one point; its code is that of level 0 (or the lowest level).
    """
    form = grid.form
    subs = torch.arange(first, first + values.shape[1], device=values.device) // form.sub
    step = grid.step[:, subs]
    y = values if grid.minimum is None else values + grid.minimum[:, subs]
    return nearest_levels(torch.where(step == 0, torch.zeros_like(y), y / step), form)


def values(grid: Grid, codes: Tensor, first: int = 0) -> Tensor:
    """The float32 values [R, c] of codes uint8 [R, c] of the columns first .. first + c: what decode will give."""
    subs = torch.arange(first, first + codes.shape[1], device=codes.device) // grid.form.sub
    product = grid.step[:, subs] * grid.levels[codes.int()]
    return product if grid.minimum is None else product - grid.minimum[:, subs]
