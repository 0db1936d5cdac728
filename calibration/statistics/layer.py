"""Statistics of one layer from one pass: input moments, routing counts, maxima."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...quantize.moments import Moments
from ...quantize.overflow import FP16_MAX

MARGIN_BINS = 33  # bin b counts gaps in [2^(b-33), 2^(b-32)); the first also holds everything smaller


@dataclass(frozen=True)
class RoutingStatistics:
    """The router's choices over N tokens and D domains, with what the experts gave back. All float32, counts exact.

    load          [D, E]  tokens of each domain that chose the expert
    coactivation  [E, E]  tokens that chose both; the diagonal is the load
    margins       [33]    tokens by log2 of (k-th largest score + bias) - (the next): bin b is [2^(b-33), 2^(b-32))
    saliency      [E]     sum of s * |y|_2 over the expert's tokens (REAP; s: renormalised sigmoid score, y: its output)
    weight4       [E]     sum of s^4: with `Moments.weight` the effective number of rows
    """

    load: Tensor
    coactivation: Tensor
    margins: Tensor
    saliency: Tensor
    weight4: Tensor

    @property
    def tokens_per_expert(self) -> Tensor:
        """[E] tokens that chose each expert."""
        return self.load.sum(0)


@dataclass(frozen=True)
class LayerStatistics:
    """All statistics of one layer; the moments are raw sums (quantize/moments.py).

    attention_in   E=1, what q, k, v see        attention_out  E=1, what o sees
    expert_in      what gate and up see           expert_mid     what down sees, per expert
    hidden_amax    [H] largest |x| per channel of the experts' input (all tokens)
    mid_amax       [E, I] largest |h| per channel of each expert's down input
    kv_amax        [2, kv_heads * head_dim] largest |k| (normed, rotated) and |v| per channel
    own            the experts whose second moments and held-out rows are whole on this rank; None: all
    """

    layer: int
    attention_in: Moments
    attention_out: Moments
    expert_in: Moments
    expert_mid: Moments
    routing: RoutingStatistics
    hidden_amax: Tensor
    mid_amax: Tensor
    kv_amax: Tensor
    own: range | None = None


MOMENT_SETS = ("attention_in", "attention_out", "expert_in", "expert_mid")
MOMENT_FIELDS = ("count", "weight", "second", "diagonal", "plain_diagonal", "amax", "sum32", "sum16", "nonfinite")
ROUTING_FIELDS = ("load", "coactivation", "margins", "saliency", "weight4")


def without_second(found: LayerStatistics) -> LayerStatistics:
    """The statistics with diagonals alone."""
    parts = {name: replace(getattr(found, name), second=None) for name in MOMENT_SETS}
    return replace(found, **parts)


def overflowing_experts(statistics: LayerStatistics) -> list[int]:
    """Experts whose down input overflows float16: in a value, or in a sum over 32 or 16 aligned channels (Q8_1)."""
    mid = statistics.expert_mid
    largest = torch.stack((mid.amax, mid.sum32, mid.sum16)).amax(0)
    return torch.nonzero(largest > FP16_MAX).flatten().tolist()


def effective_rows(statistics: LayerStatistics) -> Tensor:
    """[E] rows that an expert's router-weighted sums are worth: (sum s^2)^2 / sum s^4."""
    weight = statistics.expert_in.weight
    return weight.square() / statistics.routing.weight4.clamp(min=torch.finfo(torch.float32).tiny)


def sampling_error(moments: Moments, rows: Tensor, squares: Tensor | None = None) -> Tensor:
    """[E] expected relative error (Frobenius) of each second moment estimated from that many independent rows.

    For Gaussian rows with second moment S: sqrt((1 + r) / rows) with r = tr(S)^2 / |S|_F^2, the effective rank. Tokens
    of one text are not independent, so this is a lower estimate. Without full moments the off-diagonal part of |S|_F
    is unknown and r comes from the diagonal: an upper estimate of r. Infinite for an expert that saw nothing.
    squares [E]: |S|_F^2 when it is known already.
    """
    trace = moments.diagonal.sum(1)
    if squares is None:
        second = moments.second
        squares = moments.diagonal.square().sum(1) if second is None else second.square().sum((1, 2))
    rank = trace.square() / squares.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(rows > 0, ((1 + rank) / rows.clamp(min=1e-30)).sqrt(), torch.full_like(rows, torch.inf))


def outlier_channels(diagonal: Tensor, factor: float = 100.0) -> list[int]:
    """Channels whose E[x^2], pooled over matrices, is more than `factor` times the median channel's."""
    pooled = diagonal.sum(0)
    return torch.nonzero(pooled > factor * pooled.median()).flatten().tolist()
