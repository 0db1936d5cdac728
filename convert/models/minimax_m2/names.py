"""Release names and shapes of the tensors of MiniMax-M2, and what engines call them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .geometry import Geometry

PROJECTIONS = ("w1", "w2", "w3")  # gate, down, up
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_STACKS = (("w1", "w3"), ("w2",))  # what engines stack along the outputs
ATTENTION_STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
MOE = "block_sparse_moe"  # the module of router and experts in a layer; vLLM and transformers 5 call it mlp
ROUTER = f"{MOE}.gate"
PLAIN_NAMES = {  # field of LayerWeights: name in a layer; never quantized
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "router": f"{ROUTER}.weight",
    "router_bias": f"{MOE}.e_score_correction_bias",
}
SAMPLED = tuple(PLAIN_NAMES[field] for field in ("input_norm", "q_norm", "router_bias"))  # in a fingerprint, per layer
SGLANG_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
VLLM_MOE = "mlp"
EXPERT = re.compile(rf"(model\.layers\.(\d+))\.{MOE}\.experts\.(\d+)\.(w[123])")  # stem, layer, expert, projection
# Matrices (names without suffix) in a regular expression; no groups.
MATRIX = rf"(?:model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|{MOE}\.experts\.\d+\.\w+|{MOE}\.gate)|lm_head)"
IGNORE = ("lm_head", rf"re:.*{ROUTER}$", r"re:.*mlp\.gate$", "re:.*embed_tokens$")  # compressed-tensors' skip list
CODE_FILES = ("configuration_minimax_m2.py", "modeling_minimax_m2.py")  # that config.json's auto_map may name

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Release name of an expert's matrix, without the suffix .weight."""
    return f"model.layers.{layer}.{MOE}.experts.{expert}.{projection}"


def attention_name(layer: int, projection: str) -> str:
    """Release name of an attention matrix, without the suffix .weight."""
    return f"model.layers.{layer}.self_attn.{projection}"


def layer_of(name: str) -> int | None:
    """Layer number in a release name, None outside the layers."""
    match = _LAYER.match(name)
    return int(match.group(1)) if match else None


def is_mtp(name: str, geometry: Geometry) -> bool:
    """Multi-token-prediction tensors: known, not part of the language model, skipped."""
    layer = layer_of(name)
    return (layer is not None and layer >= geometry.layers) or ".mtp" in name or name.startswith(("mtp.", "mtp_"))


def attention_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Projection -> (out, in) of a layer's attention matrices."""
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    return dict(zip(ATTENTION, ((q, g.hidden), (kv, g.hidden), (kv, g.hidden), (g.hidden, q)), strict=True))


def expert_shape(geometry: Geometry, projection: str) -> tuple[int, int]:
    """(out, in) of one projection of an expert."""
    g = geometry
    return (g.hidden, g.expert_width) if projection == "w2" else (g.expert_width, g.hidden)


def matrix_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name without .weight, (out, in)) of a layer's quantizable matrices: attention, then experts."""
    for projection, shape in attention_shapes(geometry).items():
        yield attention_name(layer, projection), shape
    for expert in range(geometry.experts):
        for projection in PROJECTIONS:
            yield expert_name(layer, expert, projection), expert_shape(geometry, projection)


def plain_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(full name, shape) of a layer's tensors that are never quantized: norms, router and its bias."""
    g, p = geometry, layer_prefix(layer)
    yield p + PLAIN_NAMES["input_norm"], (g.hidden,)
    yield p + PLAIN_NAMES["post_norm"], (g.hidden,)
    yield p + PLAIN_NAMES["q_norm"], (g.heads * g.head_dim,)
    yield p + PLAIN_NAMES["k_norm"], (g.kv_heads * g.head_dim,)
    yield p + PLAIN_NAMES["router"], (g.experts, g.hidden)
    yield p + PLAIN_NAMES["router_bias"], (g.experts,)


def global_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """(full name, shape) outside the layers."""
    g = geometry
    return {EMBED: (g.vocab, g.hidden), FINAL_NORM: (g.hidden,), HEAD: (g.vocab, g.hidden)}


def kind_of(name: str) -> str:
    """Census kind of a tensor name: expert w1/w2/w3, attention, router, norm, embedding, head, scale, MTP aside."""
    stem, _, part = name.rpartition(".")
    if "scale" in part or part in ("qzeros", "weight_zero_point", "g_idx", "weight_g_idx", "weight_shape"):
        return "scale"
    if name in (EMBED, HEAD):
        return "embedding" if name == EMBED else "head"
    if ".experts." in name:
        return "expert " + stem.rsplit(".", 1)[-1]
    if "norm" in name:
        return "norm"
    if ".self_attn." in name:
        return "attention"
    return "router"
