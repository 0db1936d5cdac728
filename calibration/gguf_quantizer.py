"""Calibrated tensors of a GGUF file, step by step: each matrix corrected for what came before it, then rounded with
feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..convert.gguf_names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, PLAIN_TENSORS
from ..convert.minimax_m2 import Geometry, LayerWeights
from ..quantize.ggml import feedback, iquant_feedback
from ..quantize.ggml.codec import decode, encode
from ..quantize.ggml.grid import FORMS
from ..quantize.ggml.types import GGMLType
from .forward import rms_norm
from .gguf_learn import learn_experts
from .gguf_memory import WEIGHT_COPIES, solve_bytes, solve_memory
from .gguf_moments import PRIOR, SAMPLING, Pair, corrected, each_pooled
from .gguf_paired import (
    Streams,
    cured,
    experts_of,
    input_pair,
    input_pairs,
    leaving_pairs,
    middle_pairs,
    output_pair,
    overflow_exponents,
    pass_attention,
    pass_experts,
    router_pair,
)
from .learn_layer import LearnOptions

PLAIN_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


@dataclass(frozen=True)
class Method:
    """How a matrix is rounded.

    feedback  error feedback under the second moments; otherwise a search weighted by their diagonal
    correct   let each matrix make good what the layers before it lost
    repair    so do the router and the head
    passes    rounds of coordinate descent after the sweep
    learned   the experts' codes are learned on the layer's output after that (gguf_learn.py)
    damping   share of the mean diagonal added to the moments
    prior     strength of the pooled moments; sampling: ridge where rows are few (Pair.means)
    """

    feedback: bool = True
    correct: bool = True
    repair: bool = True
    passes: int = 2
    learned: bool = False
    damping: float = 0.05
    prior: float = PRIOR
    sampling: float = SAMPLING

    def moments(self, pair: Pair, chosen: slice) -> tuple[Tensor, Tensor]:
        """Mean own and cross moments with this method's regularization."""
        return pair.means(chosen, self.prior, self.sampling)


METHODS = {
    "fast": Method(feedback=False, correct=False, passes=0),
    "default": Method(),
    "high": Method(passes=6, learned=True),
}


@dataclass
class Report:
    """What a run did beyond rounding: exponents of the overflow cure by (layer, expert), experts that saw no token, and
    by layer what learning left of the held-out error."""

    cured: dict[tuple[int, int], int] = field(default_factory=dict)
    learned: dict[int, float | None] = field(default_factory=dict)
    unseen: set[tuple[int, int]] = field(default_factory=set)

    def exponents(self, layer: int, experts: int) -> Tensor:
        """[experts] float32: those of the cure."""
        return torch.tensor([float(self.cured.get((layer, expert), 0)) for expert in range(experts)])

    def of_layer(self, layer: int) -> Iterator[str]:
        """What the user should know of a layer, a line each."""
        cured = [f"{expert} (2^{k})" for (place, expert), k in sorted(self.cured.items()) if place == layer]
        unseen = [str(expert) for place, expert in sorted(self.unseen) if place == layer]
        gained = self.learned.get(layer)
        if gained is not None:
            yield f"layer {layer}: held-out error of the experts' output {gained:.3f} of what it was before learning"
        if cured:
            yield f"layer {layer}: experts {', '.join(cured)} rescaled, their sums would overflow float16 on CUDA"
        if unseen:
            yield f"layer {layer}: experts {', '.join(unseen)} saw no token, the layer's pooled moments stand in"


def solve(weight: Tensor, kind: GGMLType, pair: Pair, method: Method) -> tuple[np.ndarray, Tensor]:
    """Bytes [E, O, b] uint8 and values [E, O, n] (of weight's dtype) of E matrices [E, O, n], a few at a time."""
    experts, rows, n = weight.shape
    out, values, pair = np.empty((experts, rows, kind.row_bytes(n)), np.uint8), torch.empty_like(weight), pair.pooled()
    for start in range(0, experts, step := experts_at_once(weight)):
        part = slice(start, start + step)
        out[part], values[part] = solve_part(weight[part], kind, pair, part, method)
    return out, values


def experts_at_once(weight: Tensor) -> int:
    """How many of E matrices [E, O, n] are solved together: as many as the device's working memory holds."""
    _, rows, n = weight.shape
    return max(1, solve_memory(weight.device) // solve_bytes(rows, n))


def rows_at_once(weight: Tensor) -> int:
    """Rows of one matrix [..., O, n] that the working memory holds beside its moments; 256 at least."""
    n = weight.shape[-1]
    return max(256, (solve_memory(weight.device) - solve_bytes(0, n)) // (4 * WEIGHT_COPIES * n))


def solve_part(weight: Tensor, kind: GGMLType, pair: Pair, part: slice, method: Method) -> tuple[np.ndarray, Tensor]:
    """Bytes [E, O, b] uint8 and values [E, O, n] float32 of the matrices `part` of a pair [E, O, n], all at once."""
    stored = _solved(weight, kind, pair, part, method)
    return stored.cpu().numpy(), decode(stored.flatten(0, 1), kind, weight.shape[2]).view_as(weight)


def _solved(weight: Tensor, kind: GGMLType, pair: Pair, part: slice, method: Method) -> Tensor:
    """The bytes on the device; of a matrix that is larger than the working memory in blocks of rows."""
    if kind in PLAIN_TYPES:
        return encode(weight.float().flatten(0, 1), kind).view(*weight.shape[:2], -1)
    block = rows_at_once(weight)
    if len(weight) == 1 and block < weight.shape[1]:
        return torch.cat([_solved(few, kind, pair, part, method) for few in weight.split(block, 1)], 1)
    own, cross = method.moments(pair, part)
    target = weight.float()
    if method.correct:
        target = corrected(target, own, cross, method.damping)
    return _rounded(target, kind, own, method)


def _rounded(target: Tensor, kind: GGMLType, own: Tensor, method: Method) -> Tensor:
    if not method.feedback:
        diagonal = own.diagonal(dim1=1, dim2=2).contiguous()
        parts = [encode(rows, kind, weight) for rows, weight in zip(target, diagonal, strict=True)]
        return torch.stack(parts)
    if kind in FORMS:
        return feedback.encode_with_feedback(target, kind, feedback.factor(own, method.damping), method.passes)
    known = iquant_feedback.factor(own, kind, method.damping)
    return iquant_feedback.encode_with_feedback(target, kind, known, passes=method.passes)


def quantize_layer(
    streams: Streams,
    weights: LayerWeights,
    layer: int,
    types: dict[str, str],
    g: Geometry,
    method: Method,
    report: Report,
) -> dict[str, np.ndarray]:
    """Bytes of all tensors of a layer by GGUF name; both streams leave the layer."""
    prefix = f"blk.{layer}."
    kinds = {name: GGMLType[types[prefix + name + ".weight"]] for name in (*ATTENTION_TENSORS, *EXPERT_TENSORS)}
    out: dict[str, np.ndarray] = {}
    new = quantize_attention(streams, weights, kinds, g, method, out)
    if method.correct and method.repair:
        new = replace(new, router=repaired_router(streams, weights, g, method))
    new = quantize_experts(streams, weights, new, layer, kinds, g, method, report, out)
    if method.learned:
        source = cured(weights, report.exponents(layer, g.experts).to(weights.w1.device))
        new, report.learned[layer] = learn_experts(streams, source, new, g, kinds, out, LearnOptions())
    pass_experts(streams, streams.written, new, g)
    out = {prefix + name + ".weight": data for name, data in out.items()}
    norms = {"attn_norm.weight": new.input_norm, "attn_q_norm.weight": new.q_norm, "attn_k_norm.weight": new.k_norm}
    norms |= {"ffn_norm.weight": new.post_norm, "ffn_gate_inp.weight": new.router, "exp_probs_b.bias": new.router_bias}
    assert set(norms) == set(PLAIN_TENSORS)
    return out | {prefix + name: value.float().cpu().numpy() for name, value in norms.items()}


def quantize_attention(
    streams: Streams,
    weights: LayerWeights,
    kinds: dict[str, GGMLType],
    g: Geometry,
    method: Method,
    out: dict[str, np.ndarray],
) -> LayerWeights:
    """q, k, v, then o on what they give; the streams move past attention. Bytes are added to `out`."""
    new = weights
    for names in (("attn_q", "attn_k", "attn_v"), ("attn_output",)):
        pair = output_pair(streams, weights, new, g) if names == ("attn_output",) else input_pair(streams, weights, g)
        for name in names:
            role = ROLES[ATTENTION_TENSORS[name]]
            out[name], value = solve(getattr(weights, role).unsqueeze(0), kinds[name], pair, method)
            new = replace(new, **{role: value[0]})
    pass_attention(streams, new, g)
    return new


def repaired_router(streams: Streams, weights: LayerWeights, g: Geometry, method: Method) -> Tensor:
    """The router (float32 in the file) that on the written stream gives scores nearest to the reference's."""
    own, cross = method.moments(router_pair(streams, weights, g), slice(None))
    return corrected(weights.router.unsqueeze(0), own, cross, method.damping)[0]


@dataclass(frozen=True)
class Experts:
    """The experts of a layer on their way: `new` and `out` (bytes by short name) are filled, chunk by chunk.

    largest  [E] the reference's largest sums of 32 inputs of w2, known when all inputs were collected
    """

    streams: Streams
    weights: LayerWeights
    new: LayerWeights
    g: Geometry
    kinds: dict[str, GGMLType]
    method: Method
    out: dict[str, np.ndarray]
    largest: Tensor

    @property
    def exponents(self) -> Tensor:
        """[E] powers of two by which experts are rescaled whose w2 input would overflow float16."""
        return overflow_exponents(self.largest)

    def inputs(self, kept: range) -> Pair:
        """Sums of what w1 and w3 see."""
        part = experts_of(self.weights, kept)
        pair, self.largest[kept.start : kept.stop] = input_pairs(self.streams, part, self.g, kept)
        return pair

    def middle(self, kept: range) -> Pair:
        """Sums of what w2 sees."""
        old, new = experts_of(self.weights, kept), experts_of(self.new, kept)
        return middle_pairs(self.streams, old, new, self.g, kept, self.exponents)

    def leaving(self, kept: range) -> Pair:
        """The same for all experts; the reference leaves the layer."""
        return leaving_pairs(self.streams, self.weights, self.new, self.g, self.exponents)

    def solve_inputs(self, kept: range, pair: Pair) -> None:
        """w1 and w3: of one type, they share a factorization and a sweep."""
        gate, up = "ffn_gate_exps", "ffn_up_exps"
        for names in [(gate, up)] if self.kinds[gate] == self.kinds[up] else [(gate,), (up,)]:
            self._solve(names, kept, pair)

    def solve_middle(self, kept: range, pair: Pair) -> None:
        """w2."""
        self._solve(("ffn_down_exps",), kept, pair)

    def _solve(self, names: tuple[str, ...], kept: range, pair: Pair) -> None:
        roles, step = [EXPERT_TENSORS[name] for name in names], self.streams.plan(self.g).step
        for start in range(kept.start, kept.stop, step):
            few = slice(start, min(kept.stop, start + step))
            source = cured(experts_of(self.weights, range(few.start, few.stop)), self.exponents[few])
            part = slice(few.start - kept.start, few.stop - kept.start)
            weight = torch.cat([getattr(source, role) for role in roles], 1)
            data, values = solve_part(weight, self.kinds[names[0]], pair, part, self.method)
            for name, role, piece, value in zip(
                names, roles, np.split(data, len(names), 1), values.chunk(len(names), 1), strict=True
            ):
                self.out[name][few], getattr(self.new, role)[few] = piece, value


def quantize_experts(
    streams: Streams,
    weights: LayerWeights,
    new: LayerWeights,
    layer: int,
    kinds: dict[str, GGMLType],
    g: Geometry,
    method: Method,
    report: Report,
    out: dict[str, np.ndarray],
) -> LayerWeights:
    """w1 and w3, then w2 on what they give; the reference leaves the layer.

    Experts are taken in chunks where the device cannot hold all their moments; each chunk's are computed twice then.
    """
    empty = {role: torch.empty_like(getattr(weights, role)) for role in EXPERT_TENSORS.values()}
    for name, role in EXPERT_TENSORS.items():
        out[name] = np.empty((*empty[role].shape[:2], kinds[name].row_bytes(empty[role].shape[2])), np.uint8)
    new, largest = replace(new, **empty), torch.zeros(g.experts, device=streams.device)
    experts = Experts(streams, weights, new, g, kinds, method, out, largest)
    chunks = streams.plan(g).chunks(g.experts)
    rows = each_pooled(chunks, experts.inputs, experts.solve_inputs)
    report.unseen |= {(layer, e) for e, count in enumerate(rows.tolist()) if count == 0}
    report.cured |= {(layer, e): int(k) for e, k in enumerate(experts.exponents.tolist()) if k > 0}
    each_pooled(chunks, experts.leaving if len(chunks) == 1 else experts.middle, experts.solve_middle)
    if len(chunks) > 1:
        pass_experts(streams, streams.reference, weights, g)
    return new


def quantize_head(
    streams: Streams, head: Tensor, norm: Tensor, types: dict[str, str], g: Geometry, method: Method
) -> np.ndarray:
    """Bytes [V, b] of the output head, calibrated on the final hidden states."""
    pair = Pair.empty(1, g.hidden, streams.device)
    for _, reference, written in streams.batches():
        x, z = (rms_norm(hidden, norm, g.norm_eps).flatten(0, 1) for hidden in (reference, written))
        pair.add(0, x, z)
    method = replace(method, correct=method.correct and method.repair)
    return solve(head.unsqueeze(0), GGMLType[types[OUTPUT]], pair, method)[0][0]
