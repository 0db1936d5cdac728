"""Nearest codebook points under importance weights, on any device: the two searches of every I-quant encoder.

`scan` asks what error a block of weights has at each of several scales; `choose` also picks the best of them with the
nearest points and signs. Both are exhaustive: no neighbour lists, exact under the sign rules. CUDA: Triton, CPU:
numba, else torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...simd.tiles import in_threads, part_of
from .halves import book
from .layout import DELTA, Layout, Signs, pack_bits
from .tables import points, points_on

CHUNK = 1 << 24  # distances that the torch form holds at once


@dataclass(frozen=True)
class Choice:
    """For each of B blocks: `index` [B] int64 of the best scale and the nearest points there.

    code  [B, groups] int16; signs [B, octets] uint8, bit i = minus; minus [B, octets] bool: IQ1's delta is negative
    """

    index: Tensor
    code: Tensor
    signs: Tensor
    minus: Tensor


def scan(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Weighted error of blocks at several scales, without the constant sum(weight * x^2).

    x, weight  [B, width] float32, weight >= 0; width: layout.shared, or whole groups (PARITY: whole octets) of it
    scales     [B, S] float32, >= 0: what a unit of the codebook stands for
    returns    [B, S] float32: least sum(weight * (x - scale * sign * point)^2 - weight * x^2) of all points and signs
    """
    if x.is_cuda and _has_triton():
        from .search_triton import scan as scan_triton

        return scan_triton(x, weight, scales, layout)
    if x.device.type == "cpu":
        return _search_numba(x, weight, scales, layout, DELTA, False)[0]
    return scan_torch(x, weight, scales, layout)


def choose(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float = DELTA) -> Choice:
    """The best of several scales for each block, and the nearest points there. Arguments as in `scan`.

    delta  0: IQ1's shift is already taken out of x
    """
    if x.is_cuda and _has_triton():
        from .search_triton import choose as choose_triton

        return choose_triton(x, weight, scales, layout, delta)
    if x.device.type == "cpu":
        return _search_numba(x, weight, scales, layout, delta, True)[1]
    return choose_torch(x, weight, scales, layout, delta)


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None  # not on every platform


def numba_rule(layout: Layout) -> int:
    """The sign rule as a number of `sweep_cpu`."""
    from . import sweep_cpu as kernels

    if layout.signs is Signs.DELTA:
        return kernels.DELTA_SHARED if layout.name == "IQ1_S" else kernels.DELTA_EACH
    return kernels.FREE if layout.signs is Signs.FREE else kernels.PARITY


def _search_numba(
    x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float, choosing: bool
) -> tuple[Tensor, Choice]:
    from . import search_cpu as iquants_numba

    search: Any = iquants_numba.search_points
    (count, width), steps = x.shape, scales.shape[1]
    if steps % 4:  # the kernels take four scales at a time
        scales = torch.cat((scales, scales[:, -1:].expand(-1, 4 - steps % 4)), 1)
    ours = [t.contiguous().numpy() for t in (x, weight, scales)]
    errors = np.empty(scales.shape, np.float32)
    chosen = np.empty(count if choosing else 0, np.int64)
    code = np.empty((count, width // layout.group), np.int16)
    octets = (count, -(-width // 8))
    signs, minus = np.zeros(octets, np.uint8), np.zeros(octets, np.bool_)

    shift = np.float32(delta if layout.signs is Signs.DELTA else 0)

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        results = (errors[part], chosen[part], code[part], signs[part], minus[part])
        search(*(t[part] for t in ours), book(layout.name), numba_rule(layout), shift, *results)

    in_threads(work, count, part_of(count))
    found = [torch.from_numpy(t) for t in (chosen, code, signs, minus)]
    return torch.from_numpy(errors)[:, :steps], Choice(*found)


def _products(x: Tensor, weight: Tensor, layout: Layout, delta: float) -> tuple[Tensor, Tensor]:
    """P and Q [groups, variants, entries] of x, weight [groups, group]; variants: plain and turned, or +-delta."""
    table = points_on(layout.name, x.device)
    if layout.signs is Signs.DELTA:
        shifted = torch.stack((table + delta, table - delta))
        return torch.einsum("gi,vni->gvn", weight * x, shifted), torch.einsum("gi,vni->gvn", weight, shifted**2)
    pull = weight * x.abs()
    p, q = (pull @ table.T).unsqueeze(1), (weight @ (table.T**2)).unsqueeze(1)
    if layout.signs is Signs.FREE:
        return p, q
    least = (pull.unsqueeze(1) * table).amin(-1).unsqueeze(1)
    return torch.cat((p, p - 2 * least), 1), q.expand(-1, 2, -1)


def _least(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float) -> tuple[Tensor, Tensor]:
    """Least error and its point for each group, variant and scale: [B, groups, variants, S] float32 and int64."""
    per = x.shape[1] // layout.group
    p, q = _products(x.reshape(-1, layout.group), weight.reshape(-1, layout.group), layout, delta)
    found: list[tuple[Tensor, Tensor]] = []
    for k in range(scales.shape[1]):
        s = scales[:, k].repeat_interleave(per).reshape(-1, 1, 1)
        least, point = (s * (s * q - 2 * p)).min(-1)
        found.append((least, point))
    shape = (x.shape[0], per, p.shape[1])
    errors, codes = ([f[i].reshape(shape) for f in found] for i in (0, 1))
    return torch.stack(errors, -1), torch.stack(codes, -1)


def scan_torch(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """`scan` in plain torch: the form that runs everywhere, and that tests compare the kernels with."""
    step = _step(x, layout)
    pieces = zip(torch.split(x, step), torch.split(weight, step), torch.split(scales, step), strict=True)
    return torch.cat([combined(_least(*piece, layout, DELTA)[0], piece[0], layout)[0] for piece in pieces])


def choose_torch(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float = DELTA) -> Choice:
    """`choose` in plain torch."""
    step = _step(x, layout)
    pieces = zip(torch.split(x, step), torch.split(weight, step), torch.split(scales, step), strict=True)
    parts = [picked(*_least(*piece, layout, delta), piece[0], piece[1], layout) for piece in pieces]
    return Choice(*(torch.cat([getattr(c, name) for c in parts]) for name in ("index", "code", "signs", "minus")))


def _step(x: Tensor, layout: Layout) -> int:
    return max(1, CHUNK // (x.shape[1] // layout.group * 2 * points(layout.name).shape[0]))


def combined(least: Tensor, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Errors of blocks from those of their groups' variants, under the sign rule.

    least    [B, groups, variants, S]
    returns  [B, S] and which variant each group takes, bool [B, groups, S]: a sign turned, or delta negative
    """
    if layout.signs is Signs.FREE:
        second = torch.zeros_like(least[:, :, 0], dtype=torch.bool)
    elif layout.name == "IQ1_S":
        total = least.sum(1, keepdim=True)
        second = (total[:, :, 1] < total[:, :, 0]).expand(-1, least.shape[1], -1)
    elif layout.signs is Signs.DELTA:
        second = least[:, :, 1] < least[:, :, 0]
    else:
        odd = ((x < 0).reshape(x.shape[0], -1, 8).sum(-1) % 2 == 1).unsqueeze(-1)
        if layout.group == 8:
            second = odd.expand(-1, -1, least.shape[-1])
        else:  # IQ3_XXS: two points share one parity; the turned sign is in one of them
            cost = torch.unflatten((least[:, :, 1] - least[:, :, 0]), 1, (-1, 2))
            later = cost[:, :, 1] < cost[:, :, 0]
            second = torch.stack((odd & ~later, odd & later), 2).flatten(1, 2)
    return torch.where(second, least[:, :, -1], least[:, :, 0]).sum(1), second


def picked(least: Tensor, codes: Tensor, x: Tensor, weight: Tensor, layout: Layout) -> Choice:
    """The best scale of each block with its points and signs, from `_least`'s tables."""
    errors, second = combined(least, x, layout)
    index = errors.argmin(1)
    at = index.reshape(-1, 1, 1).expand(-1, second.shape[1], 1)
    second = second.gather(2, at).squeeze(2)
    codes = codes.gather(3, at.unsqueeze(2).expand(-1, -1, codes.shape[2], 1)).squeeze(3)
    code = torch.where(second, codes[..., -1], codes[..., 0])
    octets = (x.shape[0], -(-x.shape[1] // 8))
    if layout.signs is Signs.DELTA:
        return Choice(index, code.to(torch.int16), torch.zeros(octets, dtype=torch.uint8, device=x.device), second)
    bits = torch.nn.functional.pad(x < 0, (0, -x.shape[1] % 8)).reshape(*octets, 8)
    if layout.signs is Signs.PARITY:
        price = (weight * x.abs()).reshape(*code.shape, -1) * points_on(layout.name, x.device)[code.long()]
        turned = torch.nn.functional.one_hot(price.argmin(-1), layout.group).bool() & second.unsqueeze(-1)
        bits = bits ^ turned.reshape(*octets, 8)
    return Choice(index, code.to(torch.int16), pack_bits(bits), torch.zeros(octets, dtype=torch.bool, device=x.device))
