"""Sizes of a checkpoint, read from config.json, and how its layers compute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmquant.errors import InputError

from ..files.parse import short
from .rope import RopeScaling, read_rope, stretched

if TYPE_CHECKING:
    from .architecture import Architecture
    from .names import TensorNames

MOST = 1 << 31  # of any size in config.json


@dataclass(frozen=True)
class LayerRules:
    """What a layer computes beyond what its tensors say. A router without a bias has no tensor for one.

    scoring      what makes scores of the router's logits; the experts with the largest score (+ bias) are chosen
    qk_norm      RMS norm of q and k over all heads of a token at once, over each head, or none
    renormalize  whether the chosen experts' scores are divided by their sum
    """

    scoring: Literal["sigmoid", "softmax"]
    qk_norm: Literal["layer", "head"] | None
    renormalize: bool = True


@dataclass(frozen=True)
class Geometry(ABC):
    """Sizes of one checkpoint. Dimensions in elements; everything is read from config.json, nothing assumed.

    Each architecture has a class of its own, which says what `architecture` is.
    """

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

    @property
    @abstractmethod
    def architecture(self) -> Architecture:
        """The row of the table of architectures."""

    @property
    def names(self) -> TensorNames:
        """How its tensors are named."""
        return self.architecture.names

    @property
    def rules(self) -> LayerRules:
        """How its layers compute."""
        return self.architecture.rules

    def plain_fields(self) -> dict[str, tuple[int, ...]]:
        """Field of LayerWeights -> shape of a layer's tensors that are never quantized, in the order of the file."""
        one = self.rules.qk_norm == "head"
        shapes = {
            "input_norm": (self.hidden,),
            "post_norm": (self.hidden,),
            "q_norm": (self.head_dim if one else self.heads * self.head_dim,),
            "k_norm": (self.head_dim if one else self.kv_heads * self.head_dim,),
            "router": (self.experts, self.hidden),
            "router_bias": (self.experts,),
        }
        return {field: shapes[field] for field in self.names.plain}

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
        plain = self.layers * sum(math.prod(shape) for shape in self.plain_fields().values())
        return self.expert_weights + self.attention_weights + plain + 2 * self.vocab * self.hidden + self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: attention, router with its bias, the chosen experts, the head.

        The embedding is a look-up of one row; norms are left out.
        """
        fields = self.plain_fields()
        router = sum(math.prod(fields[name]) for name in ("router", "router_bias") if name in fields)
        chosen = self.expert_weights // self.experts * self.experts_per_token
        return self.attention_weights + chosen + self.layers * router + self.vocab * self.hidden

    def kv_bytes_per_token(self, bytes_per_32: float) -> int:
        """Bytes of keys and values of one token over all layers; `bytes_per_32` = bytes of 32 cache elements."""
        return int(self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_32 / 32)


def read_sizes(config: dict[str, Any], experts: str, width: str) -> dict[str, Any]:
    """The fields of a Geometry from config.json.

    experts, width: what it calls the count of experts and their width. Raises InputError naming the key that is missing
    or malformed.
    """
    if config.get("hidden_act") not in (None, "silu", "swish"):
        raise InputError(f"config.json: hidden_act is {short(config['hidden_act'])}, expected silu")
    head_dim, context = positive(config, "head_dim"), positive(config, "max_position_embeddings")
    rope = read_rope(config, head_dim, context)
    return {
        "layers": positive(config, "num_hidden_layers"),
        "hidden": positive(config, "hidden_size"),
        "heads": positive(config, "num_attention_heads"),
        "kv_heads": positive(config, "num_key_value_heads"),
        "head_dim": head_dim,
        "experts": positive(config, experts),
        "experts_per_token": positive(config, "num_experts_per_tok"),
        "expert_width": positive(config, width),
        "vocab": positive(config, "vocab_size"),
        "rotary_dim": rope.rotary_dim,
        "rope_theta": rope.theta,
        "norm_eps": _epsilon(config),
        "max_context": max(context, stretched(rope.scaling)),
        "rope_scaling": rope.scaling,
    }


def _epsilon(config: dict[str, Any]) -> float:
    value = config.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"config.json: rms_norm_eps is {value!r}, expected a number from 0 to 1")
    return float(value)


def positive(config: dict[str, Any], key: str) -> int:
    """A size of config.json. InputError for anything but a positive integer below 2^31."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MOST:
        raise InputError(f"config.json: {key} is {short(value)}, expected a positive integer below 2^31")
    return value
