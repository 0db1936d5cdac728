"""`refit` on CUDA (Triton): what touches every weight, fused; sums run in another order.

Tensors are [c, E, R] with rows contiguous; what comes of products of matrices has strides of its own. A program takes
TILE rows of one matrix.
"""

# Kernel arguments are pointers and numbers of the device: no annotation fits them.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .columns import Block

TILE, COLUMNS, WARPS = 128, 8, 4


@triton.jit
def _parts_kernel(
    codes, step, minimum, levels, d, low, first, second, rows, columns, column_stride,
    FIRST: tl.constexpr, UNIFORM: tl.constexpr, LOW: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    flat = tl.program_id(1).to(tl.int64) * rows + row
    place = column[:, None].to(tl.int64) * column_stride + flat[None, :]
    used = (column < columns)[:, None] & (row < rows)[None, :]
    code = tl.load(codes + place, mask=used, other=0).to(tl.int32)
    level = code.to(tl.float32) + FIRST if UNIFORM else tl.load(levels + code)
    scale = tl.load(d + flat, mask=row < rows, other=1.0).to(tl.float32)[None, :]
    value = tl.load(step + place, mask=used, other=0.0) * level / tl.where(scale == 0.0, 1.0, scale)
    tl.store(first + place, value, mask=used)
    if LOW:
        least = tl.load(low + flat, mask=row < rows, other=1.0).to(tl.float32)[None, :]
        value = -tl.load(minimum + place, mask=used, other=0.0) / tl.where(least == 0.0, 1.0, least)
        tl.store(second + place, value, mask=used)


@triton.jit
def _sums_kernel(
    first, second, bent, bent_low, pull, out, rows, columns, part_column, bent_column, bent_matrix,
    pull_column, pull_matrix, LOW: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, matrix = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1).to(tl.int64)
    line = tl.arange(0, COLUMNS)
    aa = tl.zeros((TILE,), tl.float32)
    ga = tl.zeros((TILE,), tl.float32)
    ab = tl.zeros((TILE,), tl.float32)
    bb = tl.zeros((TILE,), tl.float32)
    gb = tl.zeros((TILE,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = (start + line)[:, None].to(tl.int64)
        used = ((start + line) < columns)[:, None] & (row < rows)[None, :]
        here = column * part_column + (matrix * rows + row)[None, :]
        there = column * bent_column + matrix * bent_matrix + row[None, :]
        f = tl.load(first + here, mask=used, other=0.0)
        h = tl.load(bent + there, mask=used, other=0.0)
        p = tl.load(pull + column * pull_column + matrix * pull_matrix + row[None, :], mask=used, other=0.0)
        aa += tl.sum(f * h, 0)
        ga += tl.sum(f * p, 0)
        if LOW:
            g = tl.load(second + here, mask=used, other=0.0)
            ab += tl.sum(g * h, 0)
            bb += tl.sum(g * tl.load(bent_low + there, mask=used, other=0.0), 0)
            gb += tl.sum(g * p, 0)
    to = out + matrix * rows + row
    tl.store(to, aa, mask=row < rows)
    tl.store(to + part_column, ga, mask=row < rows)
    if LOW:
        tl.store(to + 2 * part_column, ab, mask=row < rows)
        tl.store(to + 3 * part_column, bb, mask=row < rows)
        tl.store(to + 4 * part_column, gb, mask=row < rows)


@triton.jit
def _move_kernel(
    decoded, pull, first, second, bent, bent_low, moved, lowered, rows, columns, part_column, bent_column,
    bent_matrix, pull_column, pull_matrix, LOW: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, matrix = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1).to(tl.int64)
    index = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    column = index[:, None].to(tl.int64)
    used = (index < columns)[:, None] & (row < rows)[None, :]
    here = column * part_column + (matrix * rows + row)[None, :]
    there = column * bent_column + matrix * bent_matrix + row[None, :]
    change = tl.load(moved + matrix * rows + row, mask=row < rows, other=0.0)[None, :]
    value = change * tl.load(first + here, mask=used, other=0.0)
    answer = change * tl.load(bent + there, mask=used, other=0.0)
    if LOW:
        change = tl.load(lowered + matrix * rows + row, mask=row < rows, other=0.0)[None, :]
        value += change * tl.load(second + here, mask=used, other=0.0)
        answer += change * tl.load(bent_low + there, mask=used, other=0.0)
    tl.store(decoded + here, tl.load(decoded + here, mask=used, other=0.0) + value, mask=used)
    at = pull + column * pull_column + matrix * pull_matrix + row[None, :]
    tl.store(at, tl.load(at, mask=used, other=0.0) - answer, mask=used)


def parts(block: Block) -> tuple[Tensor, Tensor | None]:
    """F and G as `refit` has them."""
    grid, minimum = block.grid, block.minimum
    first = torch.empty_like(block.step)
    second = None if minimum is None else torch.empty_like(first)
    columns, experts, rows = first.shape
    _parts_kernel[_tiles(first)](
        block.codes, block.step, block.step if minimum is None else minimum, grid.levels, grid.d,
        grid.d if grid.dmin is None else grid.dmin, first, first if second is None else second,
        rows, columns, experts * rows, FIRST=float(grid.form.levels[0]), UNIFORM=grid.form.uniform,
        LOW=second is not None, COLUMNS=COLUMNS, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    return first, second


def sums(parts: list[Tensor], bent: list[Tensor], pull: Tensor) -> Tensor:
    """As `refit`'s."""
    columns, experts, rows = parts[0].shape
    out = torch.empty(2 if len(parts) == 1 else 5, experts, rows, device=pull.device)
    tensors = [parts[0], parts[-1], bent[0], bent[-1], pull]
    assert all(tensor.stride(2) == 1 for tensor in tensors)
    assert bent[0].stride() == bent[-1].stride()
    _sums_kernel[(triton.cdiv(rows, TILE), experts)](
        *tensors, out, rows, columns, experts * rows, bent[0].stride(0), bent[0].stride(1),
        pull.stride(0), pull.stride(1), LOW=len(parts) > 1, COLUMNS=COLUMNS, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    return out


def move(decoded: Tensor, pull: Tensor, parts: list[Tensor], bent: list[Tensor], moves: list[Tensor]) -> None:
    """decoded + moves F, pull - moves H F, in place."""
    columns, experts, rows = decoded.shape
    assert decoded.is_contiguous()
    _move_kernel[_tiles(decoded)](
        decoded, pull, parts[0], parts[-1], bent[0], bent[-1], moves[0], moves[-1], rows, columns, experts * rows,
        bent[0].stride(0), bent[0].stride(1), pull.stride(0), pull.stride(1),
        LOW=len(parts) > 1, COLUMNS=COLUMNS, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


def _tiles(tensor: Tensor) -> tuple[int, int, int]:
    columns, experts, rows = tensor.shape
    return triton.cdiv(rows, TILE), experts, triton.cdiv(columns, COLUMNS)
