"""SignRound in a ggml grid: codes move by sign-SGD (quantize/signround.py), scales stay as stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ...signround import Result, Start
from .. import codec
from ..types import GGMLType
from .grid import nearest_levels

INSIDE = 0.98  # of a code's cell: where a weight that was rounded elsewhere begins


def grid_start(data: Tensor, kind: GGMLType, wanted: Tensor) -> Start:
    """Begin at the codes of `data` [E, O, b] uint8; inside its cell each weight lies where `wanted` [E, O, n] pulls it.

    So no move gives `data` again, and a weight that would rather lie elsewhere turns first. kind: one of grid.FORMS.
    """
    grid, codes = codec.unpack(data.flatten(0, -2), kind, wanted.shape[-1])
    form, step = grid.form, grid.step.unsqueeze(-1)
    values = torch.unflatten(wanted.flatten(0, -2).float(), -1, (-1, form.sub))
    if grid.minimum is not None:
        values = values + grid.minimum.unsqueeze(-1)
    position = torch.where(step == 0, torch.zeros_like(values), values / step).flatten(-2)
    levels = grid.levels
    ends = levels[[0, -1]] + torch.tensor([-0.5, 0.5], device=levels.device)
    edges = torch.cat((ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]))
    at = codes.int()
    level, low, high = levels[at], edges[at], edges[at + 1]
    position = torch.minimum(torch.maximum(position, level + INSIDE * (low - level)), level + INSIDE * (high - level))

    def shaped(part: Tensor) -> Tensor:
        return part.reshape(*wanted.shape[:-1], -1)

    minimum = None if grid.minimum is None else shaped(grid.minimum)
    table = None if form.uniform else levels
    return Start(shaped(position), shaped(grid.step), float(form.lowest), float(form.levels[-1]), minimum, table)


def stored(data: Tensor, kind: GGMLType, result: Result) -> Tensor:
    """Bytes [E, O, b] of learned levels [E, O, n] in the grid of `data`."""
    shape = result.levels.shape
    grid, _ = codec.unpack(data.flatten(0, -2), kind, shape[-1])
    codes = nearest_levels(result.levels.float(), grid.form).flatten(0, -2)
    return codec.pack(grid, codes).view(data.shape)
