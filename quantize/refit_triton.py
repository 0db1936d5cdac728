"""Curvature of rows' scales on CUDA (Triton): `refit.curvature` without storing [G, O, n]."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 128, 8


@triton.jit
def _kernel(codes_ptr, second_ptr, out_ptr, outputs, n, GROUPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    first, other = tl.program_id(1), tl.program_id(2)
    if other > first:  # symmetric
        return
    rows, inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    live = (rows < outputs)[:, None]
    at = rows[:, None].to(tl.int64) * n + inside[None, :]
    left = tl.load(codes_ptr + at + first * SIZE, mask=live, other=0.0)
    right = tl.load(codes_ptr + at + other * SIZE, mask=live, other=0.0)
    columns = (first * SIZE + inside)[:, None] * n + other * SIZE + inside[None, :]
    second = tl.load(second_ptr + columns)
    value = tl.sum(tl.dot(left, second, input_precision="tf32") * right, 1)
    place = out_ptr + rows * GROUPS * GROUPS
    tl.store(place + first * GROUPS + other, value, mask=rows < outputs)
    tl.store(place + other * GROUPS + first, value, mask=rows < outputs)


def takes(size: int) -> bool:
    """Whether groups of `size` columns fit the kernel's tiles."""
    return size in (16, 32, 64, 128)


def curvature(codes: Tensor, second: Tensor, groups: int) -> Tensor:
    """`repair.curvature`: codes [O, n] float32, second [n, n] -> [O, G, G]. Factors are rounded to TF32."""
    outputs, n = codes.shape
    out = codes.new_empty(outputs, groups, groups)
    grid = (triton.cdiv(outputs, ROWS), groups, groups)
    _kernel[grid](codes.contiguous(), second.contiguous(), out, outputs, n, groups, n // groups, ROWS, num_warps=WARPS)
    return out
