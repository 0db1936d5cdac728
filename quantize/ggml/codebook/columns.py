"""Round the columns of one super-block of an I-quant: with error feedback, or by coordinate descent.

A unit is what must be rounded together: a point, or the eight weights whose signs share a parity. Within a tile of
TILE columns its errors are fed to the units before it; a product of matrices carries those of the tile to the rest. On
CUDA one Triton kernel takes a tile; the form in torch runs everywhere. Tensors are [E, c, R]: R rows of E matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..scalar.columns import has_triton
from .encode import block_scales
from .layout import DELTA, SUPER, Fields, Layout, Signs, unpack_bits
from .search import Choice, choose
from .tables import points_on

TILE = 32  # columns whose errors are fed to each other one by one; beyond them in products of matrices


@dataclass(frozen=True)
class CodebookBlock:
    """One super-block of R rows of E matrices.

    fields  of the E * R super-blocks, contiguous; code, signs and minus are overwritten
    scale   [E * R, blocks] float32: what 1 in the codebook stands for
    weight  [E, 256] float32: importance in the search of points, the diagonal of the metric, of mean 1 in each unit
    """

    layout: Layout
    fields: Fields
    scale: Tensor
    weight: Tensor


def unit_of(layout: Layout) -> int:
    """Columns that must be rounded together: a point, or the eight weights whose signs share a parity."""
    return 8 if layout.signs is Signs.PARITY else layout.group


def new_codebook_block(layout: Layout, fields: Fields, diagonal: Tensor) -> CodebookBlock:
    """The super-block of `fields`; diagonal [E, 256] of the metric, > 0."""
    scale = block_scales(fields.scale.float(), fields.level, layout)
    parts = torch.unflatten(diagonal, 1, (-1, unit_of(layout)))
    return CodebookBlock(layout, fields, scale, (parts / parts.mean(-1, keepdim=True)).flatten(1))


def sweep_columns(block: CodebookBlock, target: Tensor, source: Tensor, decoded: Tensor, lower: Tensor) -> None:
    """Round the columns of a super-block from the last to the first, each unit after the errors of those behind it.

    target   [E, 256, R]: with the errors of other super-blocks fed in; is replaced by the errors source - decoded
    source   [E, 256, R]: the weights as they came
    decoded  [E, 256, R]: takes the values, block.fields the codes
    lower    [E, 256, 256]: L
    """
    tile = _fused().sweep_tile if _on_cuda(target) else sweep_tile
    for first in range(SUPER - TILE, -1, -TILE):
        inner = slice(first, first + TILE)
        tile(block, inner, target, source, decoded, lower)
        if first:
            target[:, :first].baddbmm_(lower[:, inner, :first].mT, target[:, inner])


def descend_columns(block: CodebookBlock, pull: Tensor, decoded: Tensor, moments: Tensor, inverse: Tensor) -> None:
    """Each unit of a super-block again, from the last to the first, all others held; only what lowers the objective.

    pull     [E, 256, R]: E H of the super-block; is replaced by the changes of `decoded`
    decoded  [E, 256, R]: follows, as block.fields does
    moments  [E, 256, 256]: H
    inverse  [E, 256 / unit, unit, unit]: of H's blocks on the diagonal
    """
    tile = _fused().descend_tile if _on_cuda(pull) else descend_tile
    for first in range(SUPER - TILE, -1, -TILE):
        inner = slice(first, first + TILE)
        tile(block, inner, pull, decoded, moments, inverse)
        if first:  # the columns behind are done in this round
            pull[:, :first].baddbmm_(moments[:, inner, :first].mT, pull[:, inner], alpha=-1)


def sweep_tile(
    block: CodebookBlock, inner: slice, target: Tensor, source: Tensor, decoded: Tensor, lower: Tensor
) -> None:
    """The columns `inner` of `sweep_columns`; their errors reach no column before them."""
    unit = unit_of(block.layout)
    for first in range(inner.stop - unit, inner.start - 1, -unit):
        columns, earlier = slice(first, first + unit), slice(inner.start, first)
        found = nearest_points(block, target[:, columns], first)
        _write(found, block, first, None)
        decoded[:, columns] = found.values
        target[:, columns] = source[:, columns] - found.values
        if first > inner.start:
            target[:, earlier].baddbmm_(lower[:, columns, earlier].mT, target[:, columns])


def descend_tile(
    block: CodebookBlock, inner: slice, pull: Tensor, decoded: Tensor, moments: Tensor, inverse: Tensor
) -> None:
    """The columns `inner` of `descend_columns`; their changes reach no column before them."""
    unit = unit_of(block.layout)
    for first in range(inner.stop - unit, inner.start - 1, -unit):
        columns, earlier = slice(first, first + unit), slice(inner.start, first)
        before = decoded[:, columns]
        found = nearest_points(block, torch.baddbmm(before, inverse[:, first // unit].mT, pull[:, columns]), first)
        change = found.values - before
        bent = torch.bmm(moments[:, columns, columns], change)
        better = (change * (bent - 2 * pull[:, columns])).sum(1, keepdim=True) < 0
        _write(found, block, first, better.flatten())
        decoded[:, columns] = torch.where(better, found.values, before)
        pull[:, columns] = torch.where(better, change, torch.zeros_like(change))
        if first > inner.start:
            pull[:, earlier].baddbmm_(moments[:, columns, earlier].mT, pull[:, columns], alpha=-1)


@dataclass(frozen=True)
class Rounded:
    """A unit of columns of E * R rows: code [E * R, points], signs uint8, minus bool [E * R]; values [E, unit, R]."""

    code: Tensor
    signs: Tensor
    minus: Tensor
    values: Tensor


def nearest_points(block: CodebookBlock, x: Tensor, first: int) -> Rounded:
    """Points nearest to x [E, unit, R], the unit at column `first`. IQ1_S keeps its delta, which 32 columns share."""
    layout, (experts, unit, rows) = block.layout, x.shape
    weight = block.weight[:, None, first : first + unit].expand(experts, rows, unit).reshape(-1, unit)
    scale, minus = block.scale[:, first // layout.shared].unsqueeze(1), block.fields.minus[:, first // 8]
    x = x.mT.reshape(-1, unit)
    x = torch.where(scale == 0, torch.zeros_like(x), x / scale)
    one = torch.ones_like(scale)
    if layout.name == "IQ1_S":
        shift = torch.where(minus, -DELTA, DELTA).unsqueeze(1)
        choice = choose(x - shift, weight, one, layout, 0.0)
        values = point_values(choice, one, layout, 0.0) + shift
    else:
        choice = choose(x, weight, one, layout)
        values = point_values(choice, one, layout, DELTA)
        minus = choice.minus[:, 0]
    return Rounded(choice.code, choice.signs[:, 0], minus, (scale * values).reshape(experts, rows, unit).mT)


def point_values(choice: Choice, scale: Tensor, layout: Layout, delta: float) -> Tensor:
    """What a choice stands for, [B, width], with scale [B, 1]."""
    points = points_on(layout.name, scale.device)[choice.code.long()].flatten(1)
    if layout.signs is Signs.DELTA:
        return scale * (points + torch.where(choice.minus, -delta, delta).repeat_interleave(8, 1))
    return scale * points * (1 - 2 * unpack_bits(choice.signs).flatten(1)[:, : points.shape[1]].float())


def _write(found: Rounded, block: CodebookBlock, first: int, where: Tensor | None) -> None:
    """Put a unit at column `first` into the fields, for the rows `where` (all when None)."""
    fields, unit = block.fields, found.values.shape[1]
    places = slice(first // block.layout.group, (first + unit) // block.layout.group)
    octet, shift = first // 8, first % 8
    keep = fields.signs[:, octet] & (255 - (((1 << unit) - 1) << shift))
    signs, minus, code = keep | (found.signs << shift), found.minus, found.code
    if where is not None:
        signs = torch.where(where, signs, fields.signs[:, octet])
        minus = torch.where(where, minus, fields.minus[:, octet])
        code = torch.where(where.unsqueeze(1), code, fields.code[:, places])
    fields.code[:, places], fields.signs[:, octet], fields.minus[:, octet] = code, signs, minus


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_triton()


def _fused() -> ModuleType:
    from . import columns_triton as iquant_columns_triton

    return iquant_columns_triton
