"""AWQ scales of a MiniMax-M2 layer: equalize inputs exactly, up to rounding of what absorbs the scale.

Four pairs: post_attention_layernorm -> router, gate and up of all experts (one scale per channel for the layer; the
router is compensated, so that the same experts are chosen); up -> down, per expert; input_layernorm -> q, k, v; v -> o,
per channel of a key-value head, shared by the query heads of its group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.integer.awq import search_equalization
from ...quantize.integer.gptq_grid import GptqGrid
from ...quantize.moments import Moments, pooled, shrunk
from ..model.distributed import rank_of
from ..model.divided import from_owner
from ..statistics.layer import LayerStatistics

SEARCH_EXPERTS = 16  # the shared scale is searched on the experts that saw most tokens


@dataclass(frozen=True)
class NormPair:
    """A norm's new weight [H] in float32 (exact in bfloat16), and the scale [H] that its readers' columns take."""

    norm: Tensor
    scale: Tensor


def absorb(norm: Tensor, scale: Tensor) -> NormPair:
    """norm / scale rounded to bfloat16, and the scale that this rounding makes exact. Zero weights stay alone."""
    target = (norm / scale).to(torch.bfloat16).float()
    exact = torch.where(target != 0, norm / torch.where(target != 0, target, torch.ones_like(target)), 1.0)
    return NormPair(torch.where(target != 0, target, norm), exact)


def experts_pair(
    weights: LayerWeights,
    statistics: LayerStatistics,
    grid: GptqGrid,
    shrinkage: float,
    pool: Tensor | None = None,
) -> NormPair:
    """The shared scale of gate and up of all experts; pool: that of the moments, when it is known."""
    device = weights.gate.device
    most = statistics.expert_in.weight.argsort(descending=True)[:SEARCH_EXPERTS].tolist()
    stacks, moments, pool = [], [], pooled(statistics.expert_in) if pool is None else pool
    for expert in sorted(most):
        one = slice(expert, expert + 1)
        stacks.append(torch.cat((weights.gate[one], weights.up[one]), 1).float())

        def mean(one: slice = one) -> Tensor:
            return shrunk(statistics.expert_in, shrinkage, one, pool).to(device)

        owner = 0 if statistics.own is None else rank_of(expert, len(weights.gate))
        moments.append(mean() if statistics.own is None else from_owner(mean, owner))
    scale = search_equalization(torch.cat(stacks), torch.cat(moments), grid, shared=True)
    return absorb(weights.post_norm.float(), scale)


def attention_pair(weights: LayerWeights, statistics: LayerStatistics, grid: GptqGrid) -> NormPair:
    """The shared scale of q, k and v."""
    stack = torch.cat((weights.q, weights.k, weights.v)).float().unsqueeze(0)
    second = shrunk(statistics.attention_in, 0.0).to(stack.device)
    return absorb(weights.input_norm.float(), search_equalization(stack, second, grid, shared=True))


def value_pair(weights: LayerWeights, moments: Moments, grid: GptqGrid, geometry: Geometry) -> Tensor:
    """[kv_heads * head_dim]: what v's rows are divided by and o's columns multiplied with, over a group."""
    second = shrunk(moments, 0.0).to(weights.o.device)
    scale = search_equalization(weights.o.float().unsqueeze(0), second, grid, shared=True)
    heads = scale.view(geometry.kv_heads, -1, geometry.head_dim)
    return heads.log().mean(1).exp().flatten()


def spread_values(scale: Tensor, geometry: Geometry) -> Tensor:
    """[heads * head_dim]: the scale of every query head's channels, from its key-value head's."""
    group = geometry.heads // geometry.kv_heads
    return scale.view(geometry.kv_heads, 1, geometry.head_dim).expand(-1, group, -1).flatten()


def expert_pairs(down: Tensor, second: Tensor, grid: GptqGrid) -> Tensor:
    """[E, I]: what down's columns are multiplied with and up's rows divided by, for a chunk; second [E, I, I]."""
    return search_equalization(down, second.to(down.device), grid, shared=False)
