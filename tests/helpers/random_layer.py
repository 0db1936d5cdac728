"""A small random layer of awkward shapes with a DEAD expert, and hidden states to send through it."""

from __future__ import annotations

import math

import torch

from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.models.minimax_m2 import Geometry

SMALL = Geometry(
    layers=1,
    hidden=40,  # not a multiple of 16 or 32
    heads=3,
    kv_heads=1,
    head_dim=20,
    experts=5,
    experts_per_token=2,
    expert_width=36,
    vocab=11,
    rotary_dim=8,
    rope_theta=1e4,
    norm_eps=1e-6,
    max_context=64,
)
DEAD = 3


def random_layer(g: Geometry = SMALL, seed: int = 0) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    bias = torch.zeros(g.experts)
    bias[DEAD] = -100.0
    return LayerWeights(
        input_norm=torch.ones(g.hidden),
        post_norm=1 + normal(g.hidden),
        q_norm=torch.ones(g.heads * g.head_dim),
        k_norm=torch.ones(g.kv_heads * g.head_dim),
        q=normal(g.heads * g.head_dim, g.hidden),
        k=normal(g.kv_heads * g.head_dim, g.hidden),
        v=normal(g.kv_heads * g.head_dim, g.hidden),
        o=normal(g.hidden, g.heads * g.head_dim),
        router=normal(g.experts, g.hidden) * 3,
        router_bias=bias,
        gate=normal(g.experts, g.expert_width, g.hidden),
        up=normal(g.experts, g.expert_width, g.hidden),
        down=normal(g.experts, g.hidden, g.expert_width),
    )


HIDDEN = torch.randn(5, 7, SMALL.hidden, generator=torch.Generator().manual_seed(1))
