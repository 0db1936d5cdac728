"""Learned rounding of a layer: its attention against what attention adds, its experts against their routed output.

The reference is the unquantized layer on the unquantized stream; the quantized layer works on the stream that the
quantized layers before it leave behind, when that is known, and so makes good part of their error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..convert.minimax_m2 import Geometry, LayerWeights
from ..quantize.learn import Learned, Schedule, Start, Weights, learn
from .forward import Observer, attention


@dataclass(frozen=True)
class Routed:
    """Tokens of a layer: the experts' input [N, H], chosen [N, K], their weights [N, K], the wanted output [N, H]."""

    x: Tensor
    chosen: Tensor
    shares: Tensor
    target: Tensor


def routed_output(weights: Mapping[str, Tensor], tokens: Routed, first: int = 0) -> Tensor:
    """Differentiable sum of the experts first..first+E-1 over the tokens that chose them: [N, H] float32."""
    w1, w3, w2 = weights["w1"], weights["w3"], weights["w2"]
    count, per_token = w1.shape[0], tokens.chosen.shape[1]
    flat = tokens.chosen.flatten() - first
    order = torch.argsort(flat, stable=True)
    numbers = flat[order]
    order = order[(numbers >= 0) & (numbers < count)]
    loads = torch.bincount(flat[order], minlength=count)
    token = order // per_token
    rows = tokens.x[token].to(w1.dtype)
    y = _experts(rows, (w1, w3, w2), loads)
    out = torch.zeros(tokens.x.shape, dtype=torch.float32, device=rows.device)
    return out.index_add(0, token, y.float() * tokens.shares.flatten()[order].unsqueeze(-1))


def _experts(rows: Tensor, weights: tuple[Tensor, Tensor, Tensor], loads: Tensor) -> Tensor:
    w1, w3, w2 = weights
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        ends = loads.cumsum(0).to(torch.int32)

        def product(x: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)  # pyright: ignore[reportPrivateImportUsage]

        return product(F.silu(product(rows, w1)) * product(rows, w3), w2)
    parts = []
    for expert, x in enumerate(rows.split(loads.tolist())):
        parts.append((F.silu(x @ w1[expert].T) * (x @ w3[expert].T)) @ w2[expert].T)
    return torch.cat(parts)


def learn_experts(
    starts: Mapping[str, Start],
    tokens: Routed,
    held: Routed,
    schedule: Schedule,
    *,
    batch: int,
    first: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Learned:
    """Learn w1, w3, w2 of experts first.. against the wanted output of `tokens`, stopped early on `held`."""
    generator = torch.Generator().manual_seed(seed)
    scale = held.target.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def loss(weights: Weights, step: int) -> Tensor:
        chosen = torch.randint(tokens.x.shape[0], (min(batch, tokens.x.shape[0]),), generator=generator)
        part = take(tokens, chosen.to(tokens.x.device))
        return (routed_output(weights, part, first) - part.target).square().mean() / scale

    def held_out(weights: Weights) -> float:
        total = torch.zeros((), device=held.x.device)
        for start in range(0, held.x.shape[0], batch):
            part = take(held, slice(start, start + batch))
            total += (routed_output(weights, part, first) - part.target).square().sum()
        return float(total / held.target.numel() / scale)

    return learn(starts, loss, held_out, schedule, dtype)


def learn_attention(
    starts: Mapping[str, Start],
    weights: LayerWeights,
    geometry: Geometry,
    streams: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    schedule: Schedule,
    *,
    batch: int,
    seed: int = 0,
) -> Learned:
    """Learn q, k, v, o. streams and held: (entering stream [W, T, H], what attention should add to it [W, T, H])."""
    generator = torch.Generator().manual_seed(seed)
    scale = held[1].square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def error(found: Weights, hidden: Tensor, target: Tensor) -> Tensor:
        layer = dataclasses.replace(weights, **{n.removesuffix("_proj"): w for n, w in found.items()})
        return (attention(layer, geometry, hidden, Observer()) - target).square().mean() / scale

    def loss(found: Weights, step: int) -> Tensor:
        chosen = torch.randint(streams[0].shape[0], (batch,), generator=generator).to(streams[0].device)
        return error(found, streams[0][chosen], streams[1][chosen])

    def held_out(found: Weights) -> float:
        parts = zip(held[0].split(batch), held[1].split(batch), strict=True)
        return sum(float(error(found, h, t)) * len(h) for h, t in parts) / len(held[0])

    return learn(starts, loss, held_out, schedule, weights.q.dtype)


def take(tokens: Routed, index: Tensor | slice) -> Routed:
    """Some of the tokens."""
    return Routed(tokens.x[index], tokens.chosen[index], tokens.shares[index], tokens.target[index])
