"""Encode rows as IQ1_S to IQ3_S: scales are searched together, each group takes its nearest codebook point.

For each super-block of 256: (1) the error of every block of 16 or 32 at a fan of scales; (2) from these curves, the
fp16 scale and the levels that lose least together; (3) levels and points at exactly that scale, least-squares refit
of the scale, and once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError

from ...overflow import FP16_MAX
from ...simd.tiles import in_threads, part_of
from ..types import GGMLType
from .halves import book
from .layout import DELTA, LAYOUTS, SUPER, Fields, Layout, Signs, field_values, pack_fields, unpack_fields
from .search import choose, numba_rule, scan
from .tables import points

CHUNK = {"cuda": 1 << 17}  # super-blocks at a time; elsewhere:
SMALL_CHUNK = 1 << 12


@dataclass(frozen=True)
class CodebookEffort:
    """How widely scales are searched: `fan` a block, `supers` a super-block, levels `near` by; `rounds` of refit."""

    fan: int
    supers: int
    near: int
    rounds: int


EFFORTS = {
    "fast": CodebookEffort(12, 9, 1, 1),
    "default": CodebookEffort(16, 13, 1, 2),
    "high": CodebookEffort(32, 25, 2, 3),
}


@dataclass(frozen=True)
class Scaled:
    """Super-blocks brought to a largest magnitude of 1, so that nothing over- or underflows.

    x, weight  [N, 256] float32, weight of mean 1; unit [N] float32: what 1 stands for
    """

    x: Tensor
    weight: Tensor
    unit: Tensor


def encode_codebook(
    rows: Tensor, kind: GGMLType, importance: Tensor | None = None, effort: CodebookEffort = EFFORTS["default"]
) -> Tensor:
    """Bytes of `rows` in the type `kind`.

    rows        [R, n], n a multiple of 256, any float dtype
    importance  [n] or [R, n], >= 0: the error is sum(importance * (row - decoded)^2); None: all equal
    returns     uint8 [R, n / 256 * bytes of a super-block]

    Raises ValueError for values that are not finite or beyond an fp16 scale, a negative importance, other shapes.
    """
    layout = layout_of(kind, rows.shape)
    check_rows(rows, layout)
    weight = checked_importance(rows, importance, layout)
    size = CHUNK.get(rows.device.type, SMALL_CHUNK)
    per_row = rows.shape[1] // SUPER
    step = max(1, size // per_row)
    parts = [
        _encode_blocks(rows[i : i + step].reshape(-1, SUPER), weight[i : i + step].reshape(-1, SUPER), layout, effort)
        for i in range(0, rows.shape[0], step)
    ]
    if not parts:
        return torch.empty(0, per_row * layout.bytes, dtype=torch.uint8, device=rows.device)
    return torch.cat(parts).reshape(rows.shape[0], -1)


def decode_codebook(data: Tensor, kind: GGMLType, columns: int) -> Tensor:
    """Weights of uint8 [R, bytes] in the type `kind`: float32 [R, columns]."""
    layout = layout_of(kind, (data.shape[0], columns))
    if data.shape[1] * SUPER != columns * layout.bytes:
        raise InputError(f"{kind.name}: {data.shape[1]} bytes a row do not hold {columns} columns")
    return field_values(unpack_fields(data.reshape(-1, layout.bytes), layout), layout).reshape(data.shape[0], columns)


def layout_of(kind: GGMLType, shape: tuple[int, ...] | torch.Size) -> Layout:
    """The layout of `kind`, once the shape is known to suit it."""
    if kind.name not in LAYOUTS:
        raise InputError(f"{kind.name} is no vector-codebook type, expected one of {', '.join(LAYOUTS)}")
    if len(shape) < 2 or shape[-1] % SUPER or not shape[-1]:
        raise InputError(f"{kind.name}: shape {tuple(shape)}, expected rows of a multiple of {SUPER} columns")
    return LAYOUTS[kind.name]


def check_rows(rows: Tensor, layout: Layout) -> None:
    """Refuse NaN, infinity, and what an fp16 scale cannot reach."""
    if rows.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(rows))
    if not (low > -math.inf and high < math.inf):
        raise InputError(f"{layout.name}: the weights hold NaN or infinity, expected finite values")
    reach = FP16_MAX * (layout.offset + layout.step * (layout.levels - 1)) * float(points(layout.name).max())
    if max(-low, high) > reach:
        raise InputError(f"{layout.name}: a weight of {max(-low, high):.3g}, the float16 scale reaches {reach:.3g}")


def checked_importance(rows: Tensor, importance: Tensor | None, layout: Layout) -> Tensor:
    """Importance as float32 of the rows' shape (a view when it is one vector)."""
    if importance is None:
        return torch.ones(1, device=rows.device).expand(rows.shape)
    if importance.shape not in (rows.shape, rows.shape[-1:], (1, *rows.shape[1:])):
        expected = f"{tuple(rows.shape[-1:])} or {tuple(rows.shape)}"
        raise InputError(f"{layout.name}: importance {tuple(importance.shape)}, expected {expected}")
    low, high = (float(v) for v in torch.aminmax(importance))
    if not (low >= 0 and high < math.inf):
        raise InputError(
            f"{layout.name}: an importance of {low if not low >= 0 else high}, expected finite values >= 0"
        )
    return importance.to(rows.device, torch.float32).expand(rows.shape)


def _encode_blocks(x: Tensor, weight: Tensor, layout: Layout, effort: CodebookEffort) -> Tensor:
    return pack_fields(search_fields(scaled(x, weight), layout, effort), layout)


def scaled(x: Tensor, weight: Tensor) -> Scaled:
    """Super-blocks [N, 256] and their importance, normalised; one without importance counts its weights alike."""
    x = x.float()
    unit = x.abs().amax(1)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    peak = weight.amax(1, keepdim=True)
    weight = torch.where(peak > 0, weight / peak.clamp(min=1e-38), torch.ones_like(weight))
    return Scaled(x / unit.unsqueeze(1), weight / weight.mean(1, keepdim=True), unit)


def search_fields(blocks: Scaled, layout: Layout, effort: CodebookEffort) -> Fields:
    """The scale, levels and points that lose least."""
    if blocks.x.device.type == "cpu":
        return _search_cpu(blocks, layout, effort)
    return search_tensors(blocks, layout, effort)


def _search_cpu(blocks: Scaled, layout: Layout, effort: CodebookEffort) -> Fields:
    from . import encode_cpu as iquants_cpu

    encode_blocks: Any = iquants_cpu.encode_super_blocks

    count = blocks.x.shape[0]
    x, weight = (t.reshape(-1, layout.shared).numpy() for t in (blocks.x, blocks.weight))
    unit = blocks.unit.contiguous().numpy()
    fan = _fan(layout, effort.fan + -effort.fan % 4, blocks.x.device).numpy()
    # IQ1 has 2048 points, of two variants: guessed scales and a round less triple its speed for 0.4 % more error.
    guessing = layout.signs is Signs.DELTA and effort is not EFFORTS["high"]
    rounds = max(1, effort.rounds - guessing)
    size, octets = len(x), layout.shared // 8
    scale = np.empty(count, np.float32)
    outs = [
        np.empty(size, np.uint8),
        np.empty((size, layout.shared // layout.group), np.int16),
        np.zeros((size, octets), np.uint8),
        np.zeros((size, octets), np.bool_),
    ]
    shift = DELTA if layout.signs is Signs.DELTA else 0
    numbers = [np.float32(v) for v in (shift, layout.offset, layout.step)]
    spread = _spread(effort, blocks.x.device).numpy()

    def work(start: int, stop: int) -> None:
        of, parts = slice(start, stop), slice(start * layout.blocks, stop * layout.blocks)
        encode_blocks(
            x[parts], weight[parts], unit[of], book(layout.name), numba_rule(layout), *numbers, layout.levels, fan,
            spread, effort.near, rounds, guessing, scale[of], *(t[parts] for t in outs),
        )  # fmt: skip

    in_threads(work, count, part_of(count))
    return Fields(torch.from_numpy(scale).half(), *(torch.from_numpy(t).reshape(count, -1) for t in outs))


def search_tensors(blocks: Scaled, layout: Layout, effort: CodebookEffort) -> Fields:
    """`search_fields` in tensor operations around `scan` and `choose`."""
    scale, level = _first_guess(blocks, layout, effort)
    fields = _near(blocks, scale, level, layout, effort.near)
    for _ in range(effort.rounds - 1):
        fields = _near(blocks, _refit(blocks, fields, layout), fields.level, layout, effort.near)
    return fields


def block_scales(scale: Tensor, level: Tensor, layout: Layout) -> Tensor:
    """What a unit of the codebook stands for in each block: scale [N], level [N, blocks, ...] -> float32 like level."""
    return scale.reshape(-1, *[1] * (level.dim() - 1)) * (layout.offset + layout.step * level.float())


def _fan(layout: Layout, steps: int, device: torch.device) -> Tensor:
    """Scales to try, relative to (largest magnitude of the block) / (largest point).

    This is where the optima were seen, with and without importance, on Gaussian, Student-t and trained weights.
    """
    low, high = (0.25, 1.0) if layout.signs is Signs.DELTA else (0.55, 1.5)
    return torch.linspace(low, high, steps, device=device)


def _spread(effort: CodebookEffort, device: torch.device) -> Tensor:
    """Super-scales to try, relative to the one at which the largest block takes the highest level."""
    return torch.linspace(0.7, 1.15, effort.supers, device=device)


def _first_guess(blocks: Scaled, layout: Layout, effort: CodebookEffort) -> tuple[Tensor, Tensor]:
    """Scale [N] and levels [N, blocks] from each block's error curve, linear between the scales that were tried."""
    x, weight = (t.reshape(-1, layout.shared) for t in (blocks.x, blocks.weight))
    count = blocks.x.shape[0]
    fan = _fan(layout, effort.fan, x.device)
    reference = x.abs().amax(1) / float(points(layout.name).max())
    errors = scan(x, weight, reference.unsqueeze(1) * fan, layout)
    best = (reference * fan[errors.argmin(1)]).reshape(count, -1)
    top = layout.offset + layout.step * (layout.levels - 1)
    tried = best.amax(1, keepdim=True) / top * _spread(effort, x.device)
    target = best.unsqueeze(2) / tried.unsqueeze(1).clamp(min=1e-30)
    level = ((target - layout.offset) / layout.step).round().clamp(0, layout.levels - 1)
    scales = (tried.unsqueeze(1) * (layout.offset + layout.step * level)).reshape(x.shape[0], -1)
    place = (scales / reference.unsqueeze(1).clamp(min=1e-30) - fan[0]) / (fan[1] - fan[0])
    place = place.clamp(0, effort.fan - 1.001)
    left = place.long()
    lower, upper = errors.gather(1, left), errors.gather(1, left + 1)
    total = torch.lerp(lower, upper, place - left).reshape(count, layout.blocks, -1).sum(1)
    winner = total.argmin(1, keepdim=True)
    return tried.gather(1, winner).squeeze(1), level.gather(
        2, winner.unsqueeze(1).expand(-1, layout.blocks, 1)
    ).squeeze(2).long()


def _near(blocks: Scaled, scale: Tensor, level: Tensor, layout: Layout, near: int) -> Fields:
    """The best levels within `near` of `level`, and the nearest points, at exactly what is stored for `scale` [N]."""
    stored = (scale * blocks.unit).clamp(0, FP16_MAX).half()
    offsets = torch.arange(-near, near + 1, device=scale.device)
    tried = (level.long().unsqueeze(2) + offsets).clamp(0, layout.levels - 1)
    scales = block_scales(stored.float() / blocks.unit, tried, layout).reshape(-1, offsets.numel())
    x, weight = (t.reshape(-1, layout.shared) for t in (blocks.x, blocks.weight))
    choice = choose(x, weight, scales, layout)
    best = tried.reshape(-1, offsets.numel()).gather(1, choice.index.unsqueeze(1)).reshape(level.shape)
    count = scale.shape[0]
    return Fields(
        stored, best.to(torch.uint8), *(t.reshape(count, -1) for t in (choice.code, choice.signs, choice.minus))
    )


def _refit(blocks: Scaled, fields: Fields, layout: Layout) -> Tensor:
    """Least-squares scale [N] for the points of `fields`."""
    unit = field_values(replace(fields, scale=torch.ones_like(fields.scale)), layout)
    pull, square = (blocks.weight * blocks.x * unit).sum(1), (blocks.weight * unit * unit).sum(1)
    return pull / square.clamp(min=1e-30)
