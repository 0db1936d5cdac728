"""Add routed rows to their tokens: out[n] = sum over k of share[n, k] * y[place[n, k]], in float32.

On CUDA one Triton kernel reads each row once and writes each token once; elsewhere plain torch. No atomics: a token's
terms are added in the order of k, so results do not change from run to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 1024


def combine(y: Tensor, place: Tensor, router_weight: Tensor) -> Tensor:
    """y [R, H] any float dtype, place [N, K] int64 rows of y, share [N, K] float32 -> [N, H] float32."""
    if not y.is_cuda:
        return (y[place.flatten()].view(*place.shape, -1).float() * router_weight.unsqueeze(-1)).sum(1)
    return launch(y.contiguous(), place.contiguous(), router_weight.contiguous())


def launch(y: Tensor, place: Tensor, router_weight: Tensor) -> Tensor:
    """`combine` by the kernel."""
    from .combine_triton import combine_kernel

    tokens, per_token = place.shape
    out = torch.empty(tokens, y.shape[1], dtype=torch.float32, device=y.device)
    grid = (tokens, -(-y.shape[1] // WIDTH))
    combine_kernel[grid](y, place, router_weight, out, y.shape[1], K=per_token, WIDTH=WIDTH, num_warps=4)  # pyright: ignore[reportCallIssue]
    return out
