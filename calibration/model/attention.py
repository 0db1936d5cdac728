"""Causal attention in blocks of queries: memory of one block's scores, and what an engine does to probabilities.

torch's fused kernels hold no scores either, but for float32 on CUDA with shared keys they fall back to the whole
matrix [heads, T, T], and none lets an engine's rounding of the probabilities in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_BYTES = 256 << 20  # float32 scores of one block of queries that may be held at once
WHOLE_BYTES = 1 << 30  # above it the whole matrix of scores is not made


def attend(q: Tensor, k: Tensor, v: Tensor, soften: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Attention of q [B, heads, T, D] to k, v [B, kv_heads, T, D] -> [B, heads, T, D], in q's dtype.

    soften: what an engine does to the unnormalized probabilities exp(score - largest), in (0, 1].
    """
    batch, heads, length, _ = q.shape
    whole = 4 * batch * heads * length * length
    if soften is None and not (q.is_cuda and q.dtype == torch.float32 and whole > WHOLE_BYTES):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return in_blocks(q, k, v, soften)


def block_of(batch: int, heads: int, length: int, limit: int = SCORE_BYTES) -> int:
    """Queries whose scores fit into `limit` bytes: at least one."""
    return max(1, min(length, limit // (4 * batch * heads * length)))


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, soften: Callable[[Tensor], Tensor] | None = None, limit: int = SCORE_BYTES
) -> Tensor:
    """`attend`, some queries at a time; scores and sums in float32."""
    batch, heads, length, width = q.shape
    shared = q.unflatten(1, (k.shape[1], -1))  # [B, kv_heads, heads that share them, T, D]
    keys, values = k.unsqueeze(2).float(), v.unsqueeze(2).float()
    out = torch.empty_like(shared)
    step, place = block_of(batch, heads, length, limit), torch.arange(length, device=q.device)
    for start in range(0, length, step):
        stop = min(start + step, length)
        scores = shared[..., start:stop, :].float() @ keys[..., :stop, :].mT / width**0.5
        scores.masked_fill_(place[:stop] > place[start:stop, None], -torch.inf)
        mass = (scores - scores.amax(-1, keepdim=True)).exp_()
        total = mass.sum(-1, keepdim=True)
        mass = mass if soften is None else soften(mass)
        out[..., start:stop, :] = (mass @ values[..., :stop, :] / total).to(q.dtype)
    return out.flatten(1, 2)
