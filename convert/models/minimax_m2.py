"""MiniMax-M2: geometry from config.json, names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmquant.errors import InputError

from ..files.parse import short, take_list
from .rope import RopeScaling, read_rope, stretched

ARCHITECTURE = "MiniMaxM2ForCausalLM"
MODEL_TYPE = "minimax_m2"
PROJECTIONS = ("w1", "w2", "w3")  # gate, down, up
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

MOST = 1 << 31  # of any size in config.json

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Geometry:
    """Sizes of one checkpoint. Dimensions in elements; everything is read from config.json, nothing assumed."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_width: int
    vocab: int
    rotary_dim: int
    rope_theta: float
    norm_eps: float
    max_context: int
    rope_scaling: RopeScaling | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        """Read config.json of the release (or of transformers 5, which moves rope into `rope_parameters`).

        Raises ValueError naming the key that is missing or not of this architecture.
        """
        check_architecture(config)
        head_dim, context = _positive(config, "head_dim"), _positive(config, "max_position_embeddings")
        rope = read_rope(config, head_dim, context)
        geometry = cls(
            layers=_positive(config, "num_hidden_layers"),
            hidden=_positive(config, "hidden_size"),
            heads=_positive(config, "num_attention_heads"),
            kv_heads=_positive(config, "num_key_value_heads"),
            head_dim=head_dim,
            experts=_positive(config, "num_local_experts"),
            experts_per_token=_positive(config, "num_experts_per_tok"),
            expert_width=_positive(config, "intermediate_size"),
            vocab=_positive(config, "vocab_size"),
            rotary_dim=rope.rotary_dim,
            rope_theta=rope.theta,
            norm_eps=_epsilon(config),
            max_context=max(context, stretched(rope.scaling)),
            rope_scaling=rope.scaling,
        )
        geometry.check()
        return geometry

    def check(self) -> None:
        """Refuse sizes that contradict each other (ValueError)."""
        if self.heads % self.kv_heads:
            raise InputError(f"config.json: {self.heads} heads are not a multiple of {self.kv_heads} key-value heads")
        if self.experts_per_token > self.experts:
            raise InputError(f"config.json: {self.experts_per_token} experts per token of {self.experts} experts")

    @property
    def expert_weights(self) -> int:
        """Weights in all experts of all layers."""
        return self.layers * self.experts * 3 * self.hidden * self.expert_width

    @property
    def attention_weights(self) -> int:
        """Weights in q, k, v, o of all layers."""
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def parameters(self) -> int:
        """All weights: experts, attention, router, norms, embeddings and head."""
        per_layer = self.experts * (self.hidden + 1) + 2 * self.hidden + (self.heads + self.kv_heads) * self.head_dim
        return (
            self.expert_weights
            + self.attention_weights
            + self.layers * per_layer
            + 2 * self.vocab * self.hidden
            + self.hidden
        )

    @property
    def active_parameters(self) -> int:
        """Weights that one token touches: chosen experts instead of all."""
        return self.parameters - self.expert_weights // self.experts * (self.experts - self.experts_per_token)

    def kv_bytes_per_token(self, bytes_per_32: float) -> int:
        """Bytes of keys and values of one token over all layers; `bytes_per_32` = bytes of 32 cache elements."""
        return int(self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_32 / 32)


def check_architecture(config: dict[str, Any]) -> None:
    """Raise ValueError unless config.json names MiniMax-M2."""
    names = take_list(config, "architectures", str, "config.json", [])
    if config.get("model_type") != MODEL_TYPE and ARCHITECTURE not in names:
        found = ", ".join(names[:3]) or short(config.get("model_type") or "nothing")
        raise InputError(f"config.json: architecture is {found}, expected {ARCHITECTURE} (model_type {MODEL_TYPE})")
    scoring = config.get("scoring_func", "sigmoid")
    if scoring != "sigmoid":
        raise InputError(f"config.json: scoring_func is {short(scoring)}, expected sigmoid")


def _epsilon(config: dict[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"config.json: rms_norm_eps is {value!r}, expected a number from 0 to 1")
    return float(value)


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MOST:
        raise InputError(f"config.json: {key} is {short(value)}, expected a positive integer below 2^31")
    return value


@dataclass(frozen=True)
class LayerWeights:
    """Dequantized weights of one decoder layer, [out, in]. Norms and router float32, the rest in the compute dtype."""

    input_norm: Tensor  # [H]
    post_norm: Tensor  # [H]
    q_norm: Tensor  # [heads * head_dim]
    k_norm: Tensor  # [kv_heads * head_dim]
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    router: Tensor  # [E, H]
    router_bias: Tensor  # [E], selection only
    w1: Tensor  # [E, I, H] gate
    w3: Tensor  # [E, I, H] up
    w2: Tensor  # [E, H, I] down


@dataclass(frozen=True)
class Globals:
    """What stands outside the layers: embeddings [V, H], final norm [H], output head [V, H]."""

    embed: Tensor
    norm: Tensor
    head: Tensor


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Release name of an expert's matrix, without the suffix .weight."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}"


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


def matrix_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name without .weight, (out, in)) of a layer's quantizable matrices: attention, then experts."""
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    attention = ((q, g.hidden), (kv, g.hidden), (kv, g.hidden), (g.hidden, q))
    for projection, shape in zip(ATTENTION, attention, strict=True):
        yield attention_name(layer, projection), shape
    for expert in range(g.experts):
        for projection in PROJECTIONS:
            shape = (g.hidden, g.expert_width) if projection == "w2" else (g.expert_width, g.hidden)
            yield expert_name(layer, expert, projection), shape


def plain_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(full name, shape) of a layer's tensors that are never quantized: norms, router and its bias."""
    g, p = geometry, layer_prefix(layer)
    yield p + "input_layernorm.weight", (g.hidden,)
    yield p + "post_attention_layernorm.weight", (g.hidden,)
    yield p + "self_attn.q_norm.weight", (g.heads * g.head_dim,)
    yield p + "self_attn.k_norm.weight", (g.kv_heads * g.head_dim,)
    yield p + "block_sparse_moe.gate.weight", (g.experts, g.hidden)
    yield p + "block_sparse_moe.e_score_correction_bias", (g.experts,)


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
