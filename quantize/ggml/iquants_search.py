"""Nearest codebook points under importance weights: the two questions of every I-quant encoder, on any device.

`scan` asks what error a block of weights has at each of several scales; `assign` asks which points and signs are nearest at one.
Both are exhaustive: no neighbour lists, exact under the sign rules. CUDA uses Triton, CPU numba, anything else plain torch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .grids import points, points_on
from .iquants_layout import DELTA, Layout, Signs

CHUNK = 1 << 24  # distances that the torch form holds at once


def scan(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Weighted error of blocks at several scales, without the constant sum(weight * x^2).

    x, weight  [B, layout.shared] float32, weight >= 0
    scales     [B, S] float32, >= 0: what a unit of the codebook stands for
    returns    [B, S] float32: min over points and allowed signs of sum(weight * (x - scale * sign * point)^2) - sum(weight * x^2)
    """
    if x.device.type == "cuda":
        from .iquants_triton import scan as scan_triton

        return scan_triton(x, weight, scales, layout)
    if x.device.type == "cpu":
        return _scan_numba(x, weight, scales, layout)
    return scan_torch(x, weight, scales, layout)


def assign(x: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest points of blocks at one scale each.

    x, weight  [B, layout.shared] float32; scale [B] float32
    returns    code int16 [B, shared/group], signs uint8 [B, shared/8] (bit i = minus), minus bool [B, shared/8] (IQ1's delta)
    """
    if x.device.type == "cuda":
        from .iquants_triton import assign as assign_triton

        return assign_triton(x, weight, scale, layout)
    if x.device.type == "cpu":
        return _assign_numba(x, weight, scale, layout)
    return assign_torch(x, weight, scale, layout)


@lru_cache
def _tables(name: str) -> tuple[np.ndarray, np.ndarray]:
    table = np.ascontiguousarray(points(name).T)
    return table, table * table


def _in_threads(work: Any, count: int) -> None:
    """work(start, stop) over range(count) in as many threads as torch uses; the kernels hold no interpreter lock."""
    threads = min(torch.get_num_threads(), max(1, count // 64))
    if threads == 1:
        return work(0, count)
    edges = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _scan_numba(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    from . import iquants_numba as kernels

    steps = scales.shape[1]
    if steps % 4:  # the kernel takes four scales at a time
        scales = torch.cat((scales, scales[:, -1:].expand(-1, 4 - steps % 4)), 1)
    ours = [t.contiguous().numpy() for t in (x, weight, scales)]
    out = np.empty(scales.shape, np.float32)

    def work(start: int, stop: int) -> None:
        blocks = [t[start:stop] for t in ours]
        if layout.signs is Signs.DELTA:
            kernels.scan_shifted(*blocks, *_tables(layout.name), np.float32(DELTA), layout.name == "IQ1_S", out[start:stop])
        else:
            kernels.scan(*blocks, *_tables(layout.name), layout.signs is Signs.PARITY, out[start:stop])

    _in_threads(work, x.shape[0])
    return torch.from_numpy(out)[:, :steps]


def _assign_numba(x: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    from . import iquants_numba as kernels

    count = x.shape[0]
    ours = [t.contiguous().numpy() for t in (x, weight, scale)]
    code = np.empty((count, layout.shared // layout.group), np.int16)
    signs, minus = np.zeros((count, layout.shared // 8), np.uint8), np.zeros((count, layout.shared // 8), np.bool_)

    def work(start: int, stop: int) -> None:
        blocks, part = [t[start:stop] for t in ours], slice(start, stop)
        if layout.signs is Signs.DELTA:
            delta, common = np.float32(DELTA), layout.name == "IQ1_S"
            kernels.assign_shifted(*blocks, *_tables(layout.name), delta, common, code[part], minus[part])
        else:
            kernels.assign(*blocks, *_tables(layout.name), layout.signs is Signs.PARITY, code[part], signs[part])

    _in_threads(work, count)
    return torch.from_numpy(code), torch.from_numpy(signs), torch.from_numpy(minus)


def _products(x: Tensor, weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """P and Q [groups, variants, entries] of x, weight [groups, group]; variants: plain and turned, or +delta and -delta."""
    table = points_on(layout.name, x.device)
    if layout.signs is Signs.DELTA:
        shifted = torch.stack((table + DELTA, table - DELTA))
        return torch.einsum("gi,vni->gvn", weight * x, shifted), torch.einsum("gi,vni->gvn", weight, shifted**2)
    pull = weight * x.abs()
    p, q = (pull @ table.T).unsqueeze(1), (weight @ (table.T**2)).unsqueeze(1)
    if layout.signs is Signs.FREE:
        return p, q
    least = (pull.unsqueeze(1) * table).amin(-1).unsqueeze(1)
    return torch.cat((p, p - 2 * least), 1), q.expand(-1, 2, -1)


def _combined(least: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Which variant each group takes, from errors [B, groups, 2]: bool [B, groups] (turned, or minus delta)."""
    if layout.name == "IQ1_M":
        return least[..., 1] < least[..., 0]
    if layout.signs is Signs.DELTA:
        total = least.sum(1, keepdim=True)
        return (total[..., 1] < total[..., 0]).expand(-1, least.shape[1])
    odd = (x < 0).reshape(x.shape[0], -1, 8).sum(-1) % 2 == 1
    if layout.group == 8:
        return odd
    gain = (least[..., 1] - least[..., 0]).reshape(x.shape[0], -1, 2)
    second = gain[..., 1] < gain[..., 0]
    return torch.stack((odd & ~second, odd & second), -1).flatten(1)


def scan_torch(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """`scan` in plain torch: the form that runs everywhere, and that tests compare the kernels with."""
    per = layout.shared // layout.group
    step = max(1, CHUNK // (per * 2 * points(layout.name).shape[0]))
    if x.shape[0] > step:
        pieces = zip(x.split(step), weight.split(step), scales.split(step), strict=True)
        return torch.cat([scan_torch(*piece, layout) for piece in pieces])
    p, q = _products(x.reshape(-1, layout.group), weight.reshape(-1, layout.group), layout)
    out = []
    for k in range(scales.shape[1]):
        s = scales[:, k].repeat_interleave(per).reshape(-1, 1, 1)
        least = (s * (s * q - 2 * p)).amin(-1).reshape(x.shape[0], per, -1)
        out.append(least[..., 0].sum(1) if least.shape[-1] == 1 else _taken(least, _combined(least, x, layout)).sum(1))
    return torch.stack(out, 1)


def _taken(pairs: Tensor, second: Tensor) -> Tensor:
    return torch.where(second, pairs[..., 1], pairs[..., 0])


def assign_torch(x: Tensor, weight: Tensor, scale: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """`assign` in plain torch."""
    per = layout.shared // layout.group
    step = max(1, CHUNK // (per * 2 * points(layout.name).shape[0]))
    if x.shape[0] > step:
        pieces = zip(x.split(step), weight.split(step), scale.split(step), strict=True)
        parts = [assign_torch(*piece, layout) for piece in pieces]
        return torch.cat([a for a, _, _ in parts]), torch.cat([b for _, b, _ in parts]), torch.cat([c for _, _, c in parts])
    p, q = _products(x.reshape(-1, layout.group), weight.reshape(-1, layout.group), layout)
    s = scale.repeat_interleave(per).reshape(-1, 1, 1)
    least, index = (s * (s * q - 2 * p)).min(-1)
    least, index = (t.reshape(x.shape[0], per, -1) for t in (least, index))
    if layout.signs is Signs.FREE:
        code, second = index[..., 0], torch.zeros_like(index[..., 0], dtype=torch.bool)
    else:
        second = _combined(least, x, layout)
        code = _taken(index, second)
    signs, minus = _signs(x, weight, code, second, layout)
    return code.to(torch.int16), signs, minus


def _signs(x: Tensor, weight: Tensor, code: Tensor, second: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Sign bytes and delta signs from the chosen variants."""
    shape = (x.shape[0], layout.shared // 8)
    none = torch.zeros(shape, dtype=torch.uint8, device=x.device)
    if layout.signs is Signs.DELTA:
        return none, second
    bits = (x < 0).reshape(*shape, 8)
    if layout.signs is Signs.PARITY:
        price = (weight * x.abs()).reshape(*code.shape, -1) * points_on(layout.name, x.device)[code]
        turn = torch.nn.functional.one_hot(price.argmin(-1), layout.group).bool() & second.unsqueeze(-1)
        bits = bits ^ turn.reshape(*shape, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=x.device)
    return (bits.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8), none.bool()
