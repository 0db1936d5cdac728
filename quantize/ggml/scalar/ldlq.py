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

from dataclasses import dataclass

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...linear_algebra import full_float32
from ..codec import check_rows, pack
from ..factor import Factor, columns_of
from ..types import GGMLType
from .columns import Block, add_times, descend_columns, new_block, sweep_columns, times
from .effort import EFFORTS
from .refit import refit
from .search import search_rows

PASSES = 2  # rounds of coordinate descent


@dataclass(frozen=True)
class UnitFactor:
    """A factor H = L D L^T of E matrices; the rest as of Factor.

    lower [E, n, n]: L, unit lower triangular; scale [E, n]: D; moments [E, n, n]: H
    """

    order: Tensor
    lower: Tensor
    scale: Tensor
    moments: Tensor

    @property
    def columns(self) -> Tensor:
        """[E, n]: the column at each place."""
        return columns_of(self.order, self.moments.shape[-1])


def unit_factor(known: Factor) -> UnitFactor:
    """L and D."""
    diagonal = known.lower.diagonal(dim1=-2, dim2=-1)
    return UnitFactor(known.order, known.lower / diagonal.unsqueeze(1), diagonal.square(), known.moments)


@dataclass(frozen=True)
class ScalarState:
    """E matrices being rounded, columns first and in processing order.

    weight, decoded, error [n, E, R] float32, error = weight - decoded where something is rounded; blocks by place
    """

    weight: Tensor
    decoded: Tensor
    error: Tensor
    blocks: list[Block | None]

    def span(self, place: int) -> slice:
        """The columns of a super-block."""
        size = self.weight.shape[0] // len(self.blocks)
        return slice(place * size, (place + 1) * size)


def encode_with_feedback(rows: Tensor, kind: GGMLType, known: UnitFactor, passes: int = PASSES) -> Tensor:
    """Bytes of E matrices with small tr((W - Q) H (W - Q)^T).

    rows [E, R, n] float32; known: `unit_factor` of the moments; returns uint8 [E, R, bytes of a row].
    Raises ValueError as `codec.search` does.
    """
    experts, _, n = rows.shape
    if known.lower.shape[:2] != (experts, n):
        raise InputError(f"{kind.name}: {experts} matrices of {n} columns, the moments are {tuple(known.lower.shape)}")
    check_rows(rows.flatten(0, 1), kind)
    weight = rows.gather(2, known.columns.unsqueeze(1).expand_as(rows)).permute(2, 0, 1).contiguous()
    empty = torch.empty_like(weight), torch.empty_like(weight)
    state = ScalarState(weight, *empty, [None] * known.order.shape[1])
    with full_float32():
        for place in range(len(state.blocks) - 1, -1, -1):
            sweep_block(state, known, kind, place)
        for _ in range(passes):
            for place in range(len(state.blocks) - 1, -1, -1):
                descend_block(state, known, place)
    return _packed(state, known, rows)


def _packed(state: ScalarState, known: UnitFactor, rows: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for block in state.blocks:
        assert block is not None
        parts.append(pack(block.grid, block.codes.flatten(1).T.contiguous()).view(*rows.shape[:2], -1))
    stacked = torch.stack(parts, 2)  # [E, R, places, bytes]
    out = torch.empty_like(stacked)
    index = known.order.view(len(rows), 1, -1, 1).expand_as(stacked)
    return out.scatter_(2, index, stacked).flatten(2)


def sweep_block(state: ScalarState, known: UnitFactor, kind: GGMLType, place: int) -> None:
    """Search and round one super-block with all earlier errors fed in."""
    span = state.span(place)
    target = state.error[span].copy_(state.weight[span])
    if span.stop < state.weight.shape[0]:
        with full_float32(False):
            add_times(target, state.error[span.stop :], known.lower[:, span.stop :, span])
    importance = known.moments.diagonal(dim1=-2, dim2=-1)[:, span].contiguous()
    grid, _ = search_rows(target.flatten(1).T.contiguous(), kind, importance, EFFORTS["default"])
    state.blocks[place] = block = new_block(grid, target.shape[1])
    sweep_columns(block, target, state.weight[span], state.decoded[span], known.lower[:, span, span])


def descend_block(state: ScalarState, known: UnitFactor, place: int) -> None:
    """The scales of one super-block by least squares, then each of its columns with all others held."""
    span, block = state.span(place), state.blocks[place]
    assert block is not None
    moments, decoded = known.moments[:, span, span], state.decoded[span]
    with full_float32(False):
        pull = times(state.error, known.moments[:, :, span])  # (E H) of this super-block [c, E, R]
    state.blocks[place] = block = refit(block, decoded, pull, moments)
    descend_columns(block, pull, decoded, moments)
    torch.sub(state.weight[span], decoded, out=state.error[span])
