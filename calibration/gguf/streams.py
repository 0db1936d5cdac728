"""Advance two residual streams through a layer: the reference stream and the quantized stream.

The reference stream runs through the original weights, the other through what was written so far. With x the reference
input of a matrix W and z the other's, sum |W x - Q z|^2 is least, before rounding, at T = W X (H + l)^-1 with
H = E z z^T, X = E x z^T (l: damping, also added to X, so that T = W where nothing is known). T is then rounded with
error feedback under H: what earlier layers lost is made good where a linear map can. Inside the layer the order is
q, k, v; o; gate, up; down; each is calibrated on the quantized matrices before it. o and down add to the residual
stream: with d what that stream lacks there, their T gets + E d z^T (H + l)^-1, for what the layers before it lost. Rows
are weighted by the reference's router weight and follow the reference's routing. After https://arxiv.org/abs/2504.02692
(asymmetric calibration), here per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmquant.stages import stage

from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ..model.distributed import max_everywhere
from ..model.forward import Observer, Routing, attention, grouped_matmul, rms_norm, route, rows_at_once, run_experts
from ..model.hidden import HiddenStates
from .memory import ExpertPlan, plan_experts, solve_memory
from .moments import Lacking, Pair


class Rows(Observer):
    """Hands the routed rows of the reference on."""

    def __init__(self, take: Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], None]) -> None:
        self.take = take

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        """Hand the rows on."""
        self.take(x, h, token, slot, offsets)


class AttentionOutput(Observer):
    """Keeps what o sees in one batch."""

    output: Tensor

    def attention_output(self, x: Tensor) -> None:
        """Keep x [N, heads * head_dim]."""
        self.output = x


@dataclass(frozen=True)
class Streams:
    """The residual stream before a layer: of the reference, and of the model as written; `batch` windows at a time.

    Under torchrun each rank has some of the windows; the pairs that are made of them are sums of all ranks.

    memory: bytes of the device for the moments of a layer's experts; None: there is room for all
    """

    reference: HiddenStates
    quantized: HiddenStates
    batch: int
    device: torch.device | str
    memory: int | None = None

    def plan(self, g: Geometry) -> ExpertPlan:
        """Experts whose moments are held, and that are solved, at once."""
        return plan_experts(g, self.memory if self.memory is not None else 1 << 62, solve_memory(self.device))

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first window, reference, written) [B, T, H] float32."""
        pairs = zip(
            self.reference.batches(self.batch, self.device),
            self.quantized.batches(self.batch, self.device),
            strict=True,
        )
        for (start, reference), (_, quantized) in pairs:
            yield start, reference, quantized

    def put(self, start: int, reference: Tensor, quantized: Tensor) -> None:
        """Replace windows of both streams, from `start` on."""
        self.reference.put(start, reference)
        self.quantized.put(start, quantized)


def input_pair(streams: Streams, weights: LayerWeights, g: Geometry) -> Pair:
    """Sums of what q, k and v see."""
    dtype = weights.q.dtype
    pair = Pair.empty(1, g.hidden, streams.device, rows=dtype)
    for _, reference, quantized in streams.batches():
        x, z = (rms_norm(hidden, weights.input_norm, g.norm_eps).flatten(0, 1) for hidden in (reference, quantized))
        pair.add_sorted(x.to(dtype), z.to(dtype), [0, len(x)])
    return pair.over_ranks()


def output_pair(streams: Streams, weights: LayerWeights, new: LayerWeights, g: Geometry) -> Pair:
    """Sums of what o sees, with q, k, v of `new` on the written side. The reference moves past attention."""
    pair = Pair.empty(1, g.heads * g.head_dim, streams.device, g.hidden, weights.q.dtype)
    for start, reference, quantized in streams.batches():
        x, z = AttentionOutput(), AttentionOutput()
        streams.reference.put(start, reference + attention(weights, g, reference, x))
        attention(new, g, quantized, z)
        lacking = Lacking((reference - quantized).flatten(0, 1))
        pair.add_sorted(x.output, z.output, [0, len(x.output)], lacking=lacking)
    return pair.over_ranks()


def pass_attention(streams: Streams, new: LayerWeights, g: Geometry) -> None:
    """Move the quantized stream past attention."""
    with stage("forward"):
        for start, quantized in streams.quantized.batches(streams.batch, streams.device):
            streams.quantized.put(start, quantized + attention(new, g, quantized, Observer()))


def router_pair(streams: Streams, weights: LayerWeights, g: Geometry) -> Pair:
    """Sums of what the router sees."""
    dtype = weights.gate.dtype
    pair = Pair.empty(1, g.hidden, streams.device, rows=dtype)
    for _, reference, quantized in streams.batches():
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, quantized))
        pair.add_sorted(x.to(dtype), z.to(dtype), [0, len(x)])
    return pair.over_ranks()


def input_pairs(streams: Streams, part: LayerWeights, g: Geometry, kept: range) -> tuple[Pair, Tensor]:
    """Sums of what gate and up of the experts `kept` see; the reference's largest |sum of 32 inputs| of down [kept].

    part: the layer with these experts alone (`experts_of`)
    """
    pair = Pair.empty(len(kept), g.hidden, streams.device, rows=part.gate.dtype)
    largest = torch.zeros(len(kept), device=streams.device)
    for rows in routed(streams, part, g, kept):
        sums = inner_rows(rows.x, part, rows.offsets).unflatten(1, (-1, 32)).sum(-1, dtype=torch.float32)
        counts = torch.tensor(rows.offsets, device=streams.device).diff()
        expert = torch.arange(len(kept), device=streams.device).repeat_interleave(counts, output_size=len(sums))
        largest.scatter_reduce_(0, expert, sums.abs().amax(1), "amax")
        pair.add_sorted(rows.x, rows.z, rows.offsets, rows.router_weight)
    return pair.over_ranks(), max_everywhere(largest)


def middle_pairs(
    streams: Streams, part: LayerWeights, new: LayerWeights, g: Geometry, kept: range, exponents: Tensor
) -> Pair:
    """Sums of what down of the experts `kept` sees, with gate and up of `new` on the quantized side; both by these.

    exponents [E]: powers of two by which the new layer's inner rows are smaller (`rescaled`)
    """
    pair = Pair.empty(len(kept), g.expert_width, streams.device, g.hidden, part.gate.dtype)
    scale = scales(exponents[kept.start : kept.stop])
    for rows in routed(streams, part, g, kept):
        x, z = (inner_rows(side, one, rows.offsets) for side, one in ((rows.x, part), (rows.z, new)))
        pair.add_sorted(x, z, rows.offsets, rows.router_weight, scale, rows.lacking)
    return pair.over_ranks()


def leaving_pairs(streams: Streams, weights: LayerWeights, new: LayerWeights, g: Geometry, exponents: Tensor) -> Pair:
    """`middle_pairs` of all experts on the way of the reference out of the layer: its rows are computed once."""
    pair = Pair.empty(g.experts, g.expert_width, streams.device, g.hidden, weights.gate.dtype)
    scale = scales(exponents)
    for start, reference, quantized in streams.batches():
        lacking = (reference - quantized).flatten(0, 1)
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, quantized))
        x, z = x.to(weights.gate.dtype), z.to(weights.gate.dtype)
        routing = route(x, weights.router, weights.router_bias, g)

        def take(_: Tensor, h: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
            inner = inner_rows(z[token], new, offsets)  # noqa: B023 - used within this iteration
            router_weight, lost = routing.weights[token, slot], Lacking(lacking, token)  # noqa: B023
            pair.add_sorted(h, inner, offsets, router_weight, scale, lost)

        moved = run_experts(weights, x, routing, Rows(take))
        streams.reference.put(start, reference + moved.view(reference.shape))
    return pair.over_ranks()


def inner_rows(x: Tensor, part: LayerWeights, offsets: list[int]) -> Tensor:
    """What down sees of rows sorted by expert [R, H]: [R, I]."""
    gate, up = (grouped_matmul(x, matrix, offsets) for matrix in (part.gate, part.up))
    return F.silu(gate) * up


def experts_of(weights: LayerWeights, kept: range) -> LayerWeights:
    """The layer with some of its experts; views."""
    chosen = slice(kept.start, kept.stop)
    return replace(weights, gate=weights.gate[chosen], up=weights.up[chosen], down=weights.down[chosen])


@dataclass(frozen=True)
class RoutedRows:
    """Rows sorted by expert: x of the reference and z of the quantized stream [R, H], router weight [R], offsets."""

    x: Tensor
    z: Tensor
    router_weight: Tensor
    offsets: list[int]
    lacking: Lacking


def routed(streams: Streams, weights: LayerWeights, g: Geometry, kept: range) -> Iterator[RoutedRows]:
    """The rows of the experts `kept`, in pieces that do not depend on which are kept."""
    for _, reference, quantized in streams.batches():
        x, z = (rms_norm(h, weights.post_norm, g.norm_eps).flatten(0, 1) for h in (reference, quantized))
        x, z, lost = x.to(weights.gate.dtype), z.to(weights.gate.dtype), (reference - quantized).flatten(0, 1)
        routing = route(x, weights.router, weights.router_bias, g)
        for token, slot, offsets in dispatch(routing, g.experts):
            first, last = offsets[kept.start], offsets[kept.stop]
            token, slot = token[first:last], slot[first:last]
            ends = [end - first for end in offsets[kept.start : kept.stop + 1]]
            router_weight = routing.weights[token, slot]
            yield RoutedRows(x[token], z[token], router_weight, ends, Lacking(lost, token))


def dispatch(routing: Routing, experts: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Routed rows sorted by expert, as many as a device holds at once: token and slot [R], offsets of the experts."""
    tokens, per_token = routing.chosen.shape
    step = max(1, rows_at_once(routing.chosen.device) // per_token)
    for start in range(0, tokens, step):
        chosen = routing.chosen[start : start + step].flatten()
        order = torch.argsort(chosen.to(torch.int16), stable=True)
        counts = torch.bincount(chosen, minlength=experts)
        yield order // per_token + start, order % per_token, [0, *torch.cumsum(counts, 0).tolist()]


def pass_experts(streams: Streams, states: HiddenStates, weights: LayerWeights, g: Geometry) -> None:
    """Move one of the streams past the experts, with its own routing."""
    with stage("forward"):
        for start, hidden in states.batches(streams.batch, streams.device):
            x = rms_norm(hidden, weights.post_norm, g.norm_eps).flatten(0, 1).to(weights.gate.dtype)
            routing = route(x, weights.router, weights.router_bias, g)
            states.put(start, hidden + run_experts(weights, x, routing, Observer()).view(hidden.shape))


def scales(exponents: Tensor) -> Tensor | None:
    """[E] factors of the rescaled experts' inner rows; None where nothing was rescaled."""
    return torch.exp2(-exponents) if bool((exponents > 0).any()) else None


def rescaled(weights: LayerWeights, exponents: Tensor) -> LayerWeights:
    """The layer with up and down rescaled by exact powers of two; its output is the same."""
    if not bool((exponents > 0).any()):
        return weights
    factor = torch.exp2(exponents).view(-1, 1, 1).to(weights.up.dtype)
    return replace(weights, up=weights.up / factor, down=weights.down * factor)
