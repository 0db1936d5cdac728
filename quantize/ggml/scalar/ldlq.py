"""LDLQ (error feedback) into the scalar grids of GGUF: K-quants, legacy types, IQ4 and MXFP4.

With mean second moments H = L D L^T (L unit lower triangular) and E = W - Q, tr(E H E^T) is the sum over columns k of
D_k |e_k + sum_{j>k} e_j L_jk|^2. Going from the last column to the first, column k is best rounded at
w_k + sum_{j>k} e_j L_jk: GPTQ, written as LDLQ (https://arxiv.org/abs/2307.13304, theorem 6). The order of super-blocks
is free: those with the most energy go first. The scales of a super-block are searched when its turn has come, on the
weights that hold the errors made so far. Then rounds of coordinate descent on the same objective: the scales of every
super-block by least squares, every column again with all others held.
Shapes: E matrices (experts) of R rows and n columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...linear_algebra import damped_cholesky, full_float32, permute_both
from ..codec import pack, search
from ..types import GGMLType
from .columns import MINI, Block, descend_columns, new_block, sweep_columns, times

SUPER = 256  # columns that are searched together, where they divide the row
DAMPING = 0.05
PASSES = 2  # rounds of coordinate descent


@dataclass(frozen=True)
class Factor:
    """Of E matrices of mean second moments, super-blocks of columns in processing order (the last goes first).

    order [E, n / super] int64; lower [E, n, n]: L; scale [E, n]: D; moments [E, n, n]: H, damped; all float32
    """

    order: Tensor
    lower: Tensor
    scale: Tensor
    moments: Tensor

    @property
    def columns(self) -> Tensor:
        """[E, n]: the column at each place."""
        size = self.lower.shape[-1] // self.order.shape[-1]
        return (self.order.unsqueeze(-1) * size + torch.arange(size, device=self.order.device)).flatten(1)


def super_columns(columns: int) -> int:
    """Columns that are searched together in rows of `columns`."""
    return SUPER if columns % SUPER == 0 else MINI


def factor(second: Tensor, damping: float = DAMPING) -> Factor:
    """Factor mean second moments [E, n, n]; `damping` is the share of the mean diagonal that is added to it.

    A matrix that has no factor even at 100 times the damping (no energy, or not finite) gets the identity: its weights
    are rounded to nearest.
    """
    experts, n = second.shape[:2]
    energy = second.diagonal(dim1=-2, dim2=-1).nan_to_num(0.0, 0.0, 0.0)
    order = torch.unflatten(energy, -1, (-1, super_columns(n))).mean(-1).argsort(dim=-1, stable=True)
    plain = Factor(order, torch.empty(experts, n, n, device="meta"), energy, second)
    columns = plain.columns
    ordered = permute_both(second, columns)
    with full_float32():
        lower = damped_cholesky(ordered, energy.mean(-1), damping)
        moments = lower @ lower.mT
    diagonal = lower.diagonal(dim1=-2, dim2=-1).clone()
    return Factor(order, lower.div_(diagonal.unsqueeze(1)), diagonal.square(), moments)


@dataclass(frozen=True)
class ScalarState:
    """E matrices being rounded, columns first and in processing order.

    weight, decoded [n, E, R] float32; blocks by place.
    """

    weight: Tensor
    decoded: Tensor
    blocks: list[Block | None]


def encode_with_feedback(rows: Tensor, kind: GGMLType, known: Factor, passes: int = PASSES) -> Tensor:
    """Bytes of E matrices with small tr((W - Q) H (W - Q)^T).

    rows [E, R, n] float32; known: `factor` of the moments; returns uint8 [E, R, bytes of a row].
    Raises ValueError as `codec.search` does.
    """
    experts, _, n = rows.shape
    if known.lower.shape[:2] != (experts, n):
        raise InputError(f"{kind.name}: {experts} matrices of {n} columns, the moments are {tuple(known.lower.shape)}")
    weight = rows.gather(2, known.columns.unsqueeze(1).expand_as(rows)).permute(2, 0, 1).contiguous()
    state = ScalarState(weight, torch.zeros_like(weight), [None] * known.order.shape[1])
    with full_float32():
        for place in range(len(state.blocks) - 1, -1, -1):
            sweep_block(state, known, kind, place)
        for _ in range(passes):
            for place in range(len(state.blocks) - 1, -1, -1):
                descend_block(state, known, place)
    return _packed(state, known, rows)


def _packed(state: ScalarState, known: Factor, rows: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for block in state.blocks:
        assert block is not None
        parts.append(pack(block.grid, block.codes.flatten(1).T.contiguous()).view(*rows.shape[:2], -1))
    stacked = torch.stack(parts, 2)  # [E, R, places, bytes]
    out = torch.empty_like(stacked)
    index = known.order.view(len(rows), 1, -1, 1).expand_as(stacked)
    return out.scatter_(2, index, stacked).flatten(2)


def sweep_block(state: ScalarState, known: Factor, kind: GGMLType, place: int) -> None:
    """Search and round one super-block with all earlier errors fed in."""
    size = state.weight.shape[0] // len(state.blocks)
    span = slice(place * size, (place + 1) * size)
    target = state.weight[span].clone()
    if span.stop < state.weight.shape[0]:
        errors = state.weight[span.stop :] - state.decoded[span.stop :]
        with full_float32(False):
            target += times(errors, known.lower[:, span.stop :, span])
    experts = target.shape[1]
    importance = known.moments.diagonal(dim1=-2, dim2=-1)[:, span].contiguous()
    grid = search(target.flatten(1).T.contiguous(), kind, importance)
    block = new_block(grid, experts)
    sweep_columns(block, target, state.weight[span], state.decoded[span], known.lower[:, span, span])
    state.blocks[place] = block


def descend_block(state: ScalarState, known: Factor, place: int) -> None:
    """The scales of one super-block by least squares, then each of its columns with all others held."""
    size = state.weight.shape[0] // len(state.blocks)
    span = slice(place * size, (place + 1) * size)
    block = state.blocks[place]
    assert block is not None
    moments = known.moments[:, span, span]
    with full_float32(False):
        pull = times(state.weight - state.decoded, known.moments[:, :, span])  # (E H) of this super-block [c, E, R]
    decoded = state.decoded[span]
    block = refit(block, decoded, pull, moments)
    descend_columns(block, pull, decoded, moments)
    state.blocks[place] = block


def refit(block: Block, decoded: Tensor, pull: Tensor, moments: Tensor) -> Block:
    """The best d (and dmin) for the codes and integers at hand; `decoded` and `pull` [c, E, R] follow in place.

    A row keeps its scales where float16 rounding leaves no gain. One d a super-block: types with several (of 32
    columns) and MXFP4's powers of two are left alone.
    """
    grid = block.grid
    if grid.d.shape[1] != 1 or grid.kind is GGMLType.MXFP4:
        return block
    shape = decoded.shape[1:]
    d = grid.d.float().view(shape)
    first = (block.step * grid.levels[block.codes.int()]) / torch.where(d == 0, torch.ones_like(d), d)
    bent = times(first, moments)
    aa, ga = (first * bent).sum(0), (first * pull).sum(0)
    if grid.dmin is None:
        change, low_change = ga / aa.clamp(min=1e-30), None
        second = None
    else:
        low = grid.dmin.float().view(shape)
        assert block.minimum is not None
        second = -block.minimum / torch.where(low == 0, torch.ones_like(low), low)
        ab, bb, gb = (second * bent).sum(0), (second * times(second, moments)).sum(0), (second * pull).sum(0)
        determinant = (aa * bb - ab * ab).clamp(min=1e-30)
        solvable = aa * bb - ab * ab > 1e-6 * aa * bb
        change = torch.where(solvable, (ga * bb - gb * ab) / determinant, ga / aa.clamp(min=1e-30))
        low_change = torch.where(solvable, (gb * aa - ga * ab) / determinant, torch.zeros_like(gb))
    new_d = (d + change).half()
    new_low = None if grid.dmin is None or low_change is None else (grid.dmin.float().view(shape) + low_change).half()
    move = (new_d.float() - d) * first
    if second is not None and new_low is not None and grid.dmin is not None:
        move = move + (new_low.float() - grid.dmin.float().view(shape)) * second
    answer = times(move, moments)
    better = (move * (answer - 2 * pull)).sum(0) < 0
    if new_low is not None:
        better &= new_low >= 0
    better &= torch.isfinite(new_d) & (d != 0)
    decoded += torch.where(better, move, torch.zeros_like(move))
    pull -= torch.where(better, answer, torch.zeros_like(answer))
    kept = torch.where(better, new_d, grid.d.view(shape)).view(-1, 1)
    lows = (
        None
        if new_low is None or grid.dmin is None
        else torch.where(better, new_low, grid.dmin.view(shape)).view(-1, 1)
    )
    return new_block(replace(grid, d=kept, dmin=lows), shape[0], block.codes)
