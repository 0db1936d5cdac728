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
from .calibrate import free_memory
from .forward import rms_norm
from .gguf_paired import (
    PRIOR,
    SAMPLING,
    Pair,
    Streams,
    corrected,
    cured,
    input_pair,
    input_pairs,
    middle_pairs,
    output_pair,
    overflow_exponents,
    pass_attention,
    pass_experts,
    router_pair,
)

PLAIN_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
WORKING_COPIES = 8  # of weights and moments that solving holds at once
CPU_WORK = 1 << 29  # bytes of them on a CPU
ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


@dataclass(frozen=True)
class Method:
    """How a matrix is rounded.

    feedback  error feedback under the second moments; otherwise a search weighted by their diagonal
    correct   let each matrix make good what the layers before it lost
    repair    so do the router and the head
    passes    rounds of coordinate descent after the sweep
    damping   share of the mean diagonal added to the moments
    prior     strength of the pooled moments; sampling: ridge where rows are few (Pair.means)
    """

    feedback: bool = True
    correct: bool = True
    repair: bool = True
    passes: int = 2
    damping: float = 0.05
    prior: float = PRIOR
    sampling: float = SAMPLING

    def moments(self, pair: Pair, chosen: slice) -> tuple[Tensor, Tensor]:
        """Mean own and cross moments with this method's regularization."""
        return pair.means(chosen, self.prior, self.sampling)


METHODS = {"fast": Method(feedback=False, correct=False, passes=0), "default": Method(), "high": Method(passes=6)}


@dataclass
class Report:
    """What a run did beyond rounding: exponents of the overflow cure by (layer, expert), experts that saw no token."""

    cured: dict[tuple[int, int], int] = field(default_factory=dict)
    unseen: set[tuple[int, int]] = field(default_factory=set)

    def of_layer(self, layer: int) -> Iterator[str]:
        """What the user should know of a layer, a line each."""
        cured = [f"{expert} (2^{k})" for (place, expert), k in sorted(self.cured.items()) if place == layer]
        unseen = [str(expert) for place, expert in sorted(self.unseen) if place == layer]
        if cured:
            yield f"layer {layer}: experts {', '.join(cured)} rescaled, their sums would overflow float16 on CUDA"
        if unseen:
            yield f"layer {layer}: experts {', '.join(unseen)} saw no token, the layer's pooled moments stand in"


def solve(weight: Tensor, kind: GGMLType, pair: Pair, method: Method) -> tuple[np.ndarray, Tensor]:
    """Bytes [E, O, b] uint8 and values [E, O, n] (of weight's dtype) of E matrices [E, O, n], a few at a time."""
    experts, rows, n = weight.shape
    if kind in PLAIN_TYPES:
        stored = encode(weight.float().view(-1, n), kind)
        return stored.view(experts, rows, -1).cpu().numpy(), decode(stored, kind, n).view_as(weight).to(weight.dtype)
    out = np.empty((experts, rows, kind.row_bytes(n)), np.uint8)
    values = torch.empty_like(weight)
    for start in range(0, experts, step := experts_at_once(weight)):
        part = slice(start, min(experts, start + step))
        own, cross = method.moments(pair, part)
        target = weight[part].float()
        if method.correct:
            target = corrected(target, own, cross, method.damping)
        stored = _rounded(target, kind, own, method)
        out[part] = stored.cpu().numpy()
        values[part] = decode(stored.flatten(0, 1), kind, n).view_as(target).to(weight.dtype)
    return out, values


def experts_at_once(weight: Tensor) -> int:
    """How many of E matrices [E, O, n] are solved together: on CUDA as many as half of the free memory holds.

    Columns are taken one after the other, so that there the time is that of launches: the fewer chunks the better.
    """
    _, rows, n = weight.shape
    work = CPU_WORK
    if weight.is_cuda:
        cached = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        work = (free_memory(weight.device) + cached) // 2
    return max(1, work // (4 * WORKING_COPIES * n * (rows + n)))


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
    pass_experts(streams, new, g)
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
    """w1 and w3, then w2 on what they give. Experts whose w2 input would overflow float16 are rescaled first."""
    pair, largest = input_pairs(streams, weights, g)
    exponents = overflow_exponents(largest)
    report.cured |= {(layer, e): int(k) for e, k in enumerate(exponents.tolist()) if k > 0}
    report.unseen |= {(layer, e) for e, rows in enumerate(pair.rows.tolist()) if rows == 0}
    source = cured(weights, exponents)
    names = ("ffn_gate_exps", "ffn_up_exps")
    if kinds[names[0]] == kinds[names[1]]:  # the same input: one factorization, one sweep
        data, value = solve(torch.cat((source.w1, source.w3), 1), kinds[names[0]], pair, method)
        out |= dict(zip(names, np.split(data, 2, axis=1), strict=True))
        new = replace(new, w1=value[:, : g.expert_width].contiguous(), w3=value[:, g.expert_width :].contiguous())
    else:
        for name in names:
            role = EXPERT_TENSORS[name]
            out[name], value = solve(getattr(source, role), kinds[name], pair, method)
            new = replace(new, **{role: value})
    del pair
    pair = middle_pairs(streams, source, new, g)
    out["ffn_down_exps"], value = solve(source.w2, kinds["ffn_down_exps"], pair, method)
    return replace(new, w2=value)


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
