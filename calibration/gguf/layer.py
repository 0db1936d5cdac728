"""Quantize the matrices of one GGUF layer in order, each corrected for the error of those before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import naming
from mmquant.stages import stage

from ...convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, PLAIN_TENSORS
from ...convert.models.geometry import Geometry
from ...convert.models.layer import LayerWeights
from ...quantize.ggml.factor import factor_moments
from ...quantize.ggml.types import GGMLType
from ..model.divided import divided, from_owner
from ..model.forward import rms_norm
from .experts import quantize_experts
from .moments import Pair, corrected
from .solve import Method, Report, solve
from .streams import Streams, input_pair, output_pair, pass_attention, pass_experts, router_pair

ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


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
    plain: dict[str, list[int]] = {}
    new = quantize_attention(streams, weights, kinds, g, method, out, plain)
    report.plain |= {(layer, name): found for name, found in plain.items()}
    if method.correct and method.repair:
        new = replace(new, router=repaired_router(streams, weights, g, method))
    new = quantize_experts(streams, weights, new, layer, kinds, g, method, report, out)
    pass_experts(streams, streams.quantized, new, g)
    out = {prefix + name + ".weight": data for name, data in out.items()}
    kept = {name: getattr(new, field) for name, field in PLAIN_TENSORS.items() if field in g.names.plain}
    return out | {prefix + name: value.float().cpu().numpy() for name, value in kept.items()}


def quantize_attention(
    streams: Streams,
    weights: LayerWeights,
    kinds: dict[str, GGMLType],
    g: Geometry,
    method: Method,
    out: dict[str, np.ndarray],
    plain: dict[str, list[int]],
) -> LayerWeights:
    """q, k, v, then o on what they give; the streams move past attention.

    Bytes are added to `out`, what was rounded without feedback to `plain`.
    """
    new = weights
    for names in (("attn_q", "attn_k", "attn_v"), ("attn_output",)):
        with stage("moments"):
            last = names == ("attn_output",)
            pair = output_pair(streams, weights, new, g) if last else input_pair(streams, weights, g)

        def solve_one(name: str, pair: Pair = pair) -> tuple[np.ndarray, Tensor, list[int]]:
            noted: list[int] = []
            with naming(name), stage("solve"):
                matrix = getattr(weights, ROLES[ATTENTION_TENSORS[name]]).unsqueeze(0)
                return *solve(matrix, kinds[name], pair, method, plain=noted), noted

        for number, (data, value, noted) in divided(names, solve_one):
            out[names[number]], plain[names[number]] = data, noted
            new = replace(new, **{ROLES[ATTENTION_TENSORS[names[number]]]: value[0]})
    pass_attention(streams, new, g)
    return new


def repaired_router(streams: Streams, weights: LayerWeights, g: Geometry, method: Method) -> Tensor:
    """The router (float32 in the file) that on the quantized stream gives scores nearest to the reference's."""
    with stage("moments"):
        pair, exact = router_pair(streams, weights, g), weights.router.float().unsqueeze(0)

    def repaired() -> Tensor:
        own, cross = method.moments(pair, slice(None))
        better = corrected(exact, own, cross, factor_moments(own, method.damping))
        assert pair.held is not None
        share = pair.held.share(slice(None), pair.held.agreement(slice(None), exact, better))
        return torch.lerp(exact, better, share.unsqueeze(2))[0]

    return from_owner(repaired)


def quantize_head(pair: Pair, head: Tensor, types: dict[str, str], method: Method) -> np.ndarray:
    """Bytes [V, b] of the output head, calibrated on the final hidden states; pair: `head_pair`."""
    method = replace(method, correct=method.correct and method.repair)
    return solve(head.unsqueeze(0), GGMLType[types[OUTPUT]], pair, method)[0][0]


def head_pair(streams: Streams, norm: Tensor, g: Geometry) -> Pair:
    """Sums of what the head sees."""
    pair = Pair.empty(1, g.hidden, streams.device)
    for _, reference, quantized in streams.batches():
        x, z = (rms_norm(hidden, norm, g.norm_eps).flatten(0, 1) for hidden in (reference, quantized))
        pair.add(0, x, z)
    return pair.over_ranks()
