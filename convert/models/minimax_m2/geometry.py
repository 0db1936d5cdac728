"""Sizes of a MiniMax-M2 checkpoint, read from config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from ...files.parse import is_list, short
from ..rope import RopeScaling, read_rope, stretched

CLASS_NAME = "MiniMaxM2ForCausalLM"
MODEL_TYPE = "minimax_m2"
MOST = 1 << 31  # of any size in config.json


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

        Raises InputError naming the key that is missing or malformed. `models.architecture_of` has chosen this class.
        """
        check_scoring(config)
        check_variants(config)
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


def check_scoring(config: dict[str, Any]) -> None:
    """InputError unless the router scores as MiniMax-M2's does."""
    scoring = config.get("scoring_func", "sigmoid")
    if scoring != "sigmoid":
        raise InputError(f"config.json: scoring_func is {short(scoring)}, expected sigmoid")


def check_variants(config: dict[str, Any]) -> None:
    """InputError for a relative of MiniMax-M2 whose layers compute something else: the tensors alone do not tell."""
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise InputError(f"config.json: hidden_act is {short(config['hidden_act'])}, expected silu")
    if config.get("use_qk_norm") not in (None, True):
        raise InputError(f"config.json: use_qk_norm is {short(config['use_qk_norm'])}, expected true")
    kinds = config.get("attn_type_list")
    if kinds is not None and (not is_list(kinds) or any(kind != 1 for kind in kinds)):
        raise InputError(f"config.json: attn_type_list is {short(kinds)}, expected 1 (full attention) for every layer")


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
