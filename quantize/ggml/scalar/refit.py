"""The best d and dmin of super-blocks for the codes and integers at hand, by least squares with all else held.

What a super-block decodes to is d * F + dmin * G, so its share of tr(E H E^T) is a quadratic form in both: five sums a
row say where it is least, and whether float16 rounding leaves a gain. Tensors are [c, E, R], R rows of E matrices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..types import GGMLType
from .columns import Block, has_triton, new_block, times
from .grid import Grid

TINY = 1e-30


def refit(block: Block, decoded: Tensor, pull: Tensor, moments: Tensor) -> Block:
    """The best d (and dmin); `decoded` and `pull` [c, E, R] follow in place. moments [E, c, c]: H.

    A row keeps its scales where float16 rounding leaves no gain. One d a super-block: types with several (of 32
    columns) and MXFP4's powers of two are left alone.
    """
    grid = block.grid
    if grid.d.shape[1] != 1 or grid.kind is GGMLType.MXFP4:
        return block
    shape = decoded.shape[1:]
    parts = [part for part in _parts(block, shape) if part is not None]
    bent = [times(part, moments) for part in parts]
    sums = _sums(parts, bent, pull)
    d, low, moves = best_scales(grid, sums)
    _move(decoded, pull, parts, bent, moves)
    return new_block(replace(grid, d=d, dmin=low), shape[0], block.codes)


def best_scales(grid: Grid, sums: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """d and dmin as stored [E * R, 1], and by how much each moved [E, R]; of `sums` [2 or 5, E, R]."""
    sums = at_unit(sums)
    shape, aa, ga = sums.shape[1:], sums[0], sums[1]
    d = grid.d.float().view(shape)
    if grid.dmin is None:
        new = (d + ga / aa.clamp(min=TINY)).half()
        moved = new.float() - d
        better = (moved * (moved * aa - 2 * ga) < 0) & torch.isfinite(new) & (d != 0)
        return torch.where(better, new, grid.d.view(shape)).view(-1, 1), None, [torch.where(better, moved, 0.0)]
    ab, bb, gb = sums[2:]
    determinant, low = aa * bb - ab * ab, grid.dmin.float().view(shape)
    solvable, divisor = determinant > 1e-6 * aa * bb, determinant.clamp(min=TINY)
    change = torch.where(solvable, (ga * bb - gb * ab) / divisor, ga / aa.clamp(min=TINY))
    new = (d + change).half()
    new_low = (low + torch.where(solvable, (gb * aa - ga * ab) / divisor, 0.0)).half()
    moved, lowered = new.float() - d, new_low.float() - low
    gain = moved * (moved * aa + 2 * lowered * ab - 2 * ga) + lowered * (lowered * bb - 2 * gb)
    better = (gain < 0) & (new_low >= 0) & torch.isfinite(new) & (d != 0)
    kept, kept_low = torch.where(better, new, grid.d.view(shape)), torch.where(better, new_low, grid.dmin.view(shape))
    moves = [torch.where(better, part, 0.0) for part in (moved, lowered)]
    return kept.view(-1, 1), kept_low.view(-1, 1), moves


def at_unit(sums: Tensor) -> Tensor:
    """The sums over a power of two of each row, exactly: products of two overflow at moments of 1e9 otherwise."""
    squares = sums[0] if len(sums) == 2 else torch.maximum(sums[0], sums[3])
    return torch.ldexp(sums, -torch.frexp(squares).exponent)


def _parts(block: Block, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """F and G."""
    if block.codes.is_cuda and has_triton():
        from . import refit_triton

        return refit_triton.parts(block)
    grid = block.grid
    d = grid.d.float().view(shape)
    first = (block.step * grid.levels[block.codes.int()]) / torch.where(d == 0, 1.0, d)
    if grid.dmin is None or block.minimum is None:
        return first, None
    low = grid.dmin.float().view(shape)
    return first, -block.minimum / torch.where(low == 0, 1.0, low)


def _sums(parts: list[Tensor], bent: list[Tensor], pull: Tensor) -> Tensor:
    """[2 or 5, E, R] over columns: F H F, F pull, and with dmin F H G, G H G, G pull."""
    if pull.is_cuda and has_triton():
        from . import refit_triton

        return refit_triton.sums(parts, bent, pull)
    pairs = [(parts[0], bent[0]), (parts[0], pull)]
    if len(parts) > 1:
        pairs += [(parts[1], bent[0]), (parts[1], bent[1]), (parts[1], pull)]
    return torch.stack([(one * other).sum(0) for one, other in pairs])


def _move(decoded: Tensor, pull: Tensor, parts: list[Tensor], bent: list[Tensor], moves: list[Tensor]) -> None:
    if pull.is_cuda and has_triton():
        from . import refit_triton

        return refit_triton.move(decoded, pull, parts, bent, moves)
    for part, answer, moved in zip(parts, bent, moves, strict=True):
        decoded.addcmul_(part, moved)
        pull.addcmul_(answer, moved, value=-1)
