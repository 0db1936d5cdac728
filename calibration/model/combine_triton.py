"""Kernel of `combine`: one program per token and range of channels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine_kernel(y, place, router_weight, out, hidden, K: tl.constexpr, WIDTH: tl.constexpr):
    """One token and WIDTH channels: the weighted sum of its K experts' rows."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = channel < hidden
    total = tl.zeros([WIDTH], tl.float32)
    for k in range(K):
        row = tl.load(place + token * K + k)
        value = tl.load(y + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(router_weight + token * K + k)
    tl.store(out + token * hidden + channel, total, mask=inside)
