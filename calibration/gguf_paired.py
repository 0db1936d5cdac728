"""One layer quantized on what the quantized layers before it really deliver: two residual streams, side by side.

The reference stream runs through the original weights, the other through what was written so far. With x the reference
input of a matrix W and z the other's, sum |W x - Q z|^2 is least, before rounding, at T = W X (H + l)^-1 with
H = E z z^T, X = E x z^T (l: damping, also added to X, so that T = W where nothing is known). T is then rounded with
error
feedback under H: what earlier layers lost is made good where a linear map can. Inside the layer the order is q, k, v;
o;
w1, w3; w2; each is calibrated on the quantized matrices before it. Rows are weighted by the reference's router weight
and
follow the reference's routing. After https://arxiv.org/abs/2504.02692 (asymmetric calibration), here per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..convert.minimax_m2 import Geometry, LayerWeights
from ..quantize.linear_algebra import cholesky, full_float32
from .forward import (
    Observer,
    Routing,
    attention,
    grouped_matmul,
    rms_norm,
    route,
    rows_at_once,
    run_experts,
)
from .hidden import HiddenStates

PRIOR = 1.0  # strength of the pooled moments, in rows per input (quantize/moments.py)
SAMPLING = 1.5  # ridge for moments of few rows, as a share of the mean diagonal at one row per input
SAFE_SUM = 65504.0 / 4  # what the largest sum of 32 inputs is brought below: two bits of margin for unseen text


@dataclass(frozen=True)
class Pair:
    """Raw sums over rows for E matrices of n inputs: own [E, n, n] of z z^T, cross [E, n, n] of x z^T, weight and rows
    [E]."""

    own: Tensor
    cross: Tensor
    weight: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, matrices: int, inputs: int, device: torch.device | str) -> Pair:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return cls(zeros(matrices, inputs, inputs), zeros(matrices, inputs, inputs), zeros(matrices), zeros(matrices))

    def add(self, matrix: int, x: Tensor, z: Tensor, share: Tensor | None = None) -> None:
        """Rows x, z [R, n] of one matrix, each counted by share^2 [R]."""
        if not len(x):
            return
        whole = x.dtype != torch.bfloat16  # sums over bfloat16 rows lose nothing that counts in TF32
        x, z = (rows.float() if share is None else rows.float() * share.unsqueeze(1) for rows in (x, z))
        with full_float32(whole):
            self.own[matrix].addmm_(z.T, z)
            self.cross[matrix].addmm_(x.T, z)
        self.weight[matrix] += len(x) if share is None else share.square().sum()
        self.rows[matrix] += len(x)

    def means(self, chosen: slice, prior: float = PRIOR, sampling: float = SAMPLING) -> tuple[Tensor, Tensor]:
        """Mean own and cross moments of some matrices, blended with the pooled ones where rows are few.

        The pool counts as `prior` * n rows of average weight and average energy. What few rows say off the diagonal is
        noise: both moments get a ridge of sampling * n / rows of the mean diagonal (at most 1).
        """
        tiny = torch.finfo(torch.float32).tiny
        weight = self.weight.clamp(min=tiny)
        energy = self.own.diagonal(dim1=1, dim2=2).mean(1) / weight  # [E]: a loud expert must not drown the others
        unit = (self.weight > 0) / energy.clamp(min=tiny) / max(1, int((self.weight > 0).sum()))
        pooled = [torch.einsum("e,eij->ij", unit / weight, part) for part in (self.own, self.cross)]
        n = self.own.shape[-1]
        pool_weight = prior * n * self.weight.sum() / self.rows.sum().clamp(min=1.0)
        share = (pool_weight / (self.weight + pool_weight).clamp(min=tiny))[chosen].view(-1, 1, 1)
        level = torch.where(self.weight > 0, energy, energy.sum() / (self.weight > 0).sum().clamp(min=1))[chosen]
        own, cross = (
            torch.lerp(part[chosen] / weight[chosen].view(-1, 1, 1), level.view(-1, 1, 1) * pool, share)
            for part, pool in zip((self.own, self.cross), pooled, strict=True)
        )
        rows = self.rows[chosen] + prior * n * (self.rows.shape[0] > 1)
        ridge = (sampling * n / rows.clamp(min=1.0)).clamp(max=1.0) * own.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(n, device=own.device) * ridge.view(-1, 1, 1)
        return own + eye, cross + eye


def corrected(weight: Tensor, own: Tensor, cross: Tensor, damping: float) -> Tensor:
    """T = W (X + l) (H + l)^-1 for weight [E, O, n]; W itself where H cannot be factored."""
    mean = own.diagonal(dim1=1, dim2=2).mean(1)
    ridge = (damping * mean).view(-1, 1, 1) * torch.eye(own.shape[-1], device=own.device)
    lower, good = cholesky(own + ridge)
    turn = torch.cholesky_solve((cross + ridge).mT, lower)
    good &= (mean > 0) & torch.isfinite(turn).flatten(1).all(1)
    return torch.where(good.view(-1, 1, 1), weight @ turn.mT, weight)


class Rows(Observer):
    """Hands the routed rows of the reference on."""

    def __init__(self, take: Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], None]) -> None:
        self.take = take

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        self.take(x, h, token, slot, offsets)


class AttentionOutput(Observer):
    """Keeps what o sees in one batch."""

    output: Tensor

    def attention_output(self, x: Tensor) -> None:
        self.output = x


@dataclass(frozen=True)
class Streams:
    """The residual stream before a layer: of the reference, and of the model as written; `batch` windows at a time."""

    reference: HiddenStates
    written: HiddenStates
    batch: int
    device: torch.device | str

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first window, reference, written) [B, T, H] float32."""
        pairs = zip(
            self.reference.batches(self.batch, self.device), self.written.batches(self.batch, self.device), strict=True
        )
        for (start, reference), (_, written) in pairs:
            yield start, reference, written

    def put(self, start: int, reference: Tensor, written: Tensor) -> None:
        self.reference.put(start, reference)
        self.written.put(start, written)


def input_pair(streams: Streams, weights: LayerWeights, g: Geometry) -> Pair:
    """Sums of what q, k and v see."""
    pair = Pair.empty(1, g.hidden, streams.device)
    for _, reference, written in streams.batches():
        x, z = (rms_norm(hidden, weights.input_norm, g.norm_eps).flatten(0, 1) for hidden in (reference, written))
        pair.add(0, x.to(weights.q.dtype), z.to(weights.q.dtype))
    return pair


def output_pair(streams: Streams, weights: LayerWeights, new: LayerWeights, g: Geometry) -> Pair:
    """Sums of what o sees, with q, k, v of `new` on the written side. The reference moves past attention."""
    pair = Pair.empty(1, g.heads * g.head_dim, streams.device)
    for start, reference, written in streams.batches():
        x, z = AttentionOutput(), AttentionOutput()
        streams.reference.put(start, reference + attention(weights, g, reference, x))
        attention(new, g, written, z)
        pair.add(0, x.output, z.output)
    return pair


def pass_attention(streams: Streams, new: LayerWeights, g: Geometry) -> None:
    """Move the written stream past attention."""
    for start, written in streams.written.batches(streams.batch, streams.device):
        streams.written.put(start, written + attention(new, g, written, Observer()))


def router_pair(streams: Streams, weights: LayerWeights, g: Geometry) -> Pair:
    """Sums of what the router sees."""
    pair = Pair.empty(1, g.hidden, streams.device)
    for _, reference, written in streams.batches():
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, written))
        pair.add(0, x, z)
    return pair


def input_pairs(streams: Streams, weights: LayerWeights, g: Geometry) -> tuple[Pair, Tensor]:
    """Sums of what the experts' w1 and w3 see; by expert [E], the reference's largest |sum of 32 inputs| of w2."""
    pair = Pair.empty(g.experts, g.hidden, streams.device)
    largest = torch.zeros(g.experts, device=streams.device)
    for _, reference, written in streams.batches():
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, written))
        x, z = x.to(weights.w1.dtype), z.to(weights.w1.dtype)
        routing = route(x, weights.router, weights.router_bias, g.experts_per_token)
        for token, slot, offsets in dispatch(routing, g.experts):
            rows = x[token]
            gate, up = (grouped_matmul(rows, matrix, offsets) for matrix in (weights.w1, weights.w3))
            sums = (F.silu(gate) * up).float().unflatten(1, (-1, 32)).sum(-1).abs().amax(1)
            add_rows(pair, rows, z[token], routing.weights[token, slot], offsets)
            for expert, (start, stop) in enumerate(pairwise(offsets)):
                if stop > start:
                    largest[expert] = torch.maximum(largest[expert], sums[start:stop].amax())
    return pair, largest


def middle_pairs(streams: Streams, weights: LayerWeights, new: LayerWeights, g: Geometry) -> Pair:
    """Sums of what the experts' w2 see, with w1 and w3 of `new` on the written side. The reference leaves the layer."""
    pair = Pair.empty(g.experts, g.expert_width, streams.device)
    for start, reference, written in streams.batches():
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, written))
        x, z = x.to(weights.w1.dtype), z.to(weights.w1.dtype)
        routing = route(x, weights.router, weights.router_bias, g.experts_per_token)

        def take(_: Tensor, h: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
            rows = z[token]  # noqa: B023 - used within this iteration
            gate, up = (grouped_matmul(rows, matrix, offsets) for matrix in (new.w1, new.w3))
            add_rows(pair, h, F.silu(gate) * up, routing.weights[token, slot], offsets)  # noqa: B023

        moved = run_experts(weights, x, routing, Rows(take))
        streams.reference.put(start, reference + moved.view(reference.shape))
    return pair


def dispatch(routing: Routing, experts: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Routed rows sorted by expert, as many as a device holds at once: token and slot [R], offsets of the experts."""
    tokens, per_token = routing.chosen.shape
    step = max(1, rows_at_once(routing.chosen.device) // per_token)
    for start in range(0, tokens, step):
        chosen = routing.chosen[start : start + step].flatten()
        order = torch.argsort(chosen.to(torch.int16), stable=True)
        counts = torch.bincount(chosen, minlength=experts)
        yield order // per_token + start, order % per_token, [0, *torch.cumsum(counts, 0).tolist()]


def add_rows(pair: Pair, x: Tensor, z: Tensor, share: Tensor, offsets: list[int]) -> None:
    """Rows [R, n] sorted by expert, to the sums of their experts."""
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        pair.add(expert, x[start:stop], z[start:stop], share[start:stop])


def pass_experts(streams: Streams, new: LayerWeights, g: Geometry) -> None:
    """Move the written stream past the experts, with its own routing."""
    for start, hidden in streams.written.batches(streams.batch, streams.device):
        x = rms_norm(hidden, new.post_norm, g.norm_eps).flatten(0, 1).to(new.w1.dtype)
        routing = route(x, new.router, new.router_bias, g.experts_per_token)
        streams.written.put(start, hidden + run_experts(new, x, routing, Observer()).view(hidden.shape))


def overflow_exponents(largest: Tensor) -> Tensor:
    """[E] powers of two by which w3 is divided and w2 multiplied, so that sums of 32 stay below SAFE_SUM; 0 for most.

    CUDA keeps such sums in float16 for Q4_K, Q5_K and others (llama.cpp ggml-cuda/quantize.cu).
    """
    over = largest > 65504.0 / 2
    wanted = torch.ceil(torch.log2((largest / SAFE_SUM).clamp(min=1.0)))
    return torch.where(over, wanted, torch.zeros_like(wanted))


def cured(weights: LayerWeights, exponents: Tensor) -> LayerWeights:
    """The layer with up and down rescaled by exact powers of two; its output is the same."""
    if not bool((exponents > 0).any()):
        return weights
    factor = torch.exp2(exponents).view(-1, 1, 1).to(weights.w3.dtype)
    return replace(weights, w3=weights.w3 / factor, w2=weights.w2 * factor)
