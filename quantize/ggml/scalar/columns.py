"""Round the columns of one super-block of a scalar grid: with error feedback, or by coordinate descent.

On a CPU a numba kernel takes them all; on CUDA a Triton kernel takes MINI at a time, and products of matrices carry
their errors to the others; the form in torch runs everywhere. Tensors are [c, E, R]: columns first, R rows of E
matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .grid import Grid, nearest_levels

MINI = 32  # columns whose errors are fed to each other one by one; beyond them in products of matrices


@dataclass(frozen=True)
class Block:
    """One super-block of all rows, columns first: the stored scales spread over columns.

    grid of E * R rows; step, minimum [c, E, R] float32 (minimum None where the type has none); codes [c, E, R] uint8
    """

    grid: Grid
    step: Tensor
    minimum: Tensor | None
    codes: Tensor

    def round(self, column: int, target: Tensor) -> Tensor:
        """Codes of one column nearest to `target` [E, R] are kept; their values are returned."""
        step = self.step[column]
        low = None if self.minimum is None else self.minimum[column]
        y = target if low is None else target + low
        code = nearest_levels(torch.where(step == 0, torch.zeros_like(y), y / step), self.grid.form)
        self.codes[column] = code
        value = step * self.grid.levels[code.int()]
        return value if low is None else value - low


def new_block(grid: Grid, experts: int, codes: Tensor | None = None) -> Block:
    """Spread a super-block's scales; the codes are to come unless given."""
    sub = grid.form.sub

    def spread(part: Tensor) -> Tensor:
        wide = part.T.unsqueeze(1).expand(-1, sub, -1)
        return wide.reshape(grid.columns, experts, -1).contiguous()

    step = spread(grid.step)
    minimum = None if grid.minimum is None else spread(grid.minimum)
    return Block(grid, step, minimum, torch.empty_like(step, dtype=torch.uint8) if codes is None else codes)


def times(errors: Tensor, matrix: Tensor) -> Tensor:
    """errors [m, E, R], matrix [E, m, c] -> [c, E, R]."""
    return torch.bmm(matrix.mT, errors.transpose(0, 1)).transpose(0, 1)


def add_times(sums: Tensor, errors: Tensor, matrix: Tensor, sign: int = 1) -> None:
    """The same, times `sign`, added to sums [c, E, R]."""
    sums.transpose(0, 1).baddbmm_(matrix.mT, errors.transpose(0, 1), alpha=sign)


def sweep_columns(block: Block, target: Tensor, weight: Tensor, decoded: Tensor, lower: Tensor) -> None:
    """Round the columns of a super-block from the last to the first, each after the errors of those behind it.

    target, weight [c, E, R]: with the errors of other super-blocks fed in, and as they came; target is replaced by the
    errors weight - decoded
    decoded [c, E, R]: takes the values, block.codes the codes; lower [E, c, c]: L
    """
    if target.device.type == "cpu":
        from . import columns_cpu as feedback_cpu

        feedback_cpu.sweep_columns(block, target, weight, decoded, lower)
        torch.sub(weight, decoded, out=target)
        return
    inside = _fused().sweep_inner if target.is_cuda and has_triton() else sweep_inner
    for first in range(len(target) - MINI, -1, -MINI):
        inner = slice(first, first + MINI)
        inside(block, inner, target, weight, decoded, lower)
        if first:
            add_times(target[:first], target[inner], lower[:, inner, :first])


def descend_columns(block: Block, pull: Tensor, decoded: Tensor, moments: Tensor) -> None:
    """Each column of a super-block again, from the last to the first, all others held.

    pull [c, E, R]: (E H) of the super-block, overwritten on the way; decoded [c, E, R] and block.codes follow;
    moments [E, c, c]: H
    """
    if pull.device.type == "cpu":
        from . import columns_cpu as feedback_cpu

        return feedback_cpu.descend_columns(block, pull, decoded, moments)
    inside = _fused().descend_inner if pull.is_cuda and has_triton() else descend_inner
    for first in range(len(pull) - MINI, -1, -MINI):
        inner = slice(first, first + MINI)
        inside(block, inner, pull, decoded, moments)
        if first:  # the columns behind are done in this round
            add_times(pull[:first], pull[inner], moments[:, inner, :first], -1)


def sweep_inner(block: Block, inner: slice, target: Tensor, weight: Tensor, decoded: Tensor, lower: Tensor) -> None:
    """The columns `inner` of a super-block, one by one; their errors replace `target`, and reach no column before."""
    for column in range(inner.stop - 1, inner.start - 1, -1):
        decoded[column] = block.round(column, target[column])
        error = target[column] = weight[column] - decoded[column]
        target[inner.start : column] += lower[:, column, inner.start : column].T.unsqueeze(-1) * error


def descend_inner(block: Block, inner: slice, pull: Tensor, decoded: Tensor, moments: Tensor) -> None:
    """The columns `inner` of a super-block, one by one; their changes replace `pull`, and reach no column before."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1).T.unsqueeze(-1)  # [c, E, 1]
    for column in range(inner.stop - 1, inner.start - 1, -1):
        value = block.round(column, decoded[column] + pull[column] / diagonal[column])
        change = pull[column] = value - decoded[column]
        decoded[column] = value
        pull[inner.start : column] -= moments[:, column, inner.start : column].T.unsqueeze(-1) * change


@lru_cache
def has_triton() -> bool:
    """Whether the CUDA kernels can run; Triton is not there on every platform."""
    return find_spec("triton") is not None


def _fused() -> ModuleType:
    from . import columns_triton as feedback_triton

    return feedback_triton
