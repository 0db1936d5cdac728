"""Store second moments as upper triangles in float32 or bfloat16; sizes of a layer's file."""

from __future__ import annotations

import torch
from torch import Tensor

from ...convert.models.geometry import Geometry

STORED = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}


def triangle(second: Tensor) -> Tensor:
    """[n, n] symmetric -> [n(n+1)/2], the upper triangle row by row."""
    row, column = torch.triu_indices(second.shape[-1], second.shape[-1], device=second.device)
    return second[row, column]


def square(packed: Tensor, inputs: int) -> Tensor:
    """The inverse of `triangle`: [..., n(n+1)/2] -> [..., n, n] float32."""
    row, column = torch.triu_indices(inputs, inputs)
    out = torch.empty(*packed.shape[:-1], inputs, inputs)
    out[..., row, column] = packed.float()
    out[..., column, row] = packed.float()
    return out


def stored_bytes(geometry: Geometry, full: bool, dtype: str, experts: str = "routed") -> int:
    """Bytes of one layer's file, without its header."""
    g = geometry
    query, small = g.heads * g.head_dim, 0
    for matrices, inputs in ((1, g.hidden), (1, query), (g.experts, g.hidden), (g.experts, g.expert_width)):
        small += 4 * matrices * (6 + 2 * inputs)
    small += 4 * (g.experts**2 + 3 * g.experts + 33 + g.hidden + g.experts * g.expert_width)
    small += 8 * g.kv_heads * g.head_dim
    if not full:
        return small
    size = STORED[dtype][0].itemsize
    first = 1 if experts == "all" else g.experts
    triangles = ((1, g.hidden), (1, query), (first, g.hidden), (g.experts, g.expert_width))
    small += 8 * g.experts
    return small + size * sum(m * n * (n + 1) // 2 for m, n in triangles)
