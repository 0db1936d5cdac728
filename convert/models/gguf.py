"""What GGUF says of an architecture: its keys, and config.json made of them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from .geometry import Geometry
from .rope_keys import rope_parameters, scaling_values

SIGMOID, SOFTMAX = 2, 1  # expert_gating_func of llama.cpp
GATING = {"sigmoid": SIGMOID, "softmax": SOFTMAX}


@dataclass(frozen=True)
class GgufFacts:
    """An architecture in GGUF. Source: llama.cpp src/llama-arch.cpp, src/models/, conversion/.

    arch     general.architecture, and what its keys begin with
    pre      tokenizer.ggml.pre
    pattern  the regular expression of the pre-tokenizer that `pre` stands for
    """

    arch: str
    pre: str
    pattern: str


class Metadata:
    """Typed access to a file's metadata. `label` stands in messages."""

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.values, self.label = values, label

    def number(self, key: str, default: int | None = None) -> int:
        """An integer; InputError for anything else."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{self.label}: {key} is {reprlib.repr(value)}, expected an integer")
        return value

    def real(self, key: str) -> float:
        """A number; InputError for anything else."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.label}: {key} is {reprlib.repr(value)}, expected a number")
        return float(value)


def architecture_keys(geometry: Geometry) -> dict[str, tuple[str, Any]]:
    """ARCH.* in the converter's order: key -> (kind, value)."""
    g = geometry
    values: dict[str, tuple[str, Any]] = {
        "block_count": ("u32", g.layers),
        "context_length": ("u32", g.max_context),
        "embedding_length": ("u32", g.hidden),
        "feed_forward_length": ("u32", g.expert_width),
        "attention.head_count": ("u32", g.heads),
        "attention.head_count_kv": ("u32", g.kv_heads),
        "rope.freq_base": ("f32", g.rope_theta),
        "attention.layer_norm_rms_epsilon": ("f32", g.norm_eps),
        "expert_count": ("u32", g.experts),
        "expert_used_count": ("u32", g.experts_per_token),
        "expert_gating_func": ("u32", GATING[g.rules.scoring]),
        "attention.key_length": ("u32", g.head_dim),
        "attention.value_length": ("u32", g.head_dim),
        "expert_feed_forward_length": ("u32", g.expert_width),
        "rope.dimension_count": ("u32", g.rotary_dim),
        **scaling_values(g.rope_scaling),
    }
    return {f"{g.architecture.gguf.arch}.{key}": value for key, value in values.items()}


def read_keys(metadata: Metadata, arch: str, scoring: str, experts: str, width: str) -> dict[str, Any]:
    """config.json of a file's metadata; `experts`, `width`: as `read_sizes` reads them. The vocabulary is not in it.

    Raises InputError for what is missing, malformed, or scored otherwise than by `scoring`.
    """
    number, label = metadata.number, metadata.label
    expected = GATING[scoring]
    gating = number(f"{arch}.expert_gating_func", expected)
    if gating != expected:
        raise InputError(f"{label}: expert_gating_func is {gating}, expected {expected} ({scoring})")
    head_dim = number(f"{arch}.attention.key_length")
    if number(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise InputError(f"{label}: attention.value_length is not key_length {head_dim}")
    scaling = rope_parameters(metadata.values, arch, label)
    return {
        "num_hidden_layers": number(f"{arch}.block_count"),
        "hidden_size": number(f"{arch}.embedding_length"),
        width: number(f"{arch}.expert_feed_forward_length", number(f"{arch}.feed_forward_length", 0)),
        "num_attention_heads": number(f"{arch}.attention.head_count"),
        "num_key_value_heads": number(f"{arch}.attention.head_count_kv"),
        "head_dim": head_dim,
        experts: number(f"{arch}.expert_count"),
        "num_experts_per_tok": number(f"{arch}.expert_used_count"),
        "rotary_dim": number(f"{arch}.rope.dimension_count", head_dim),
        "rope_theta": metadata.real(f"{arch}.rope.freq_base"),
        "rms_norm_eps": metadata.real(f"{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number(f"{arch}.context_length"),
        **({} if scaling is None else {"rope_parameters": scaling}),
    }
