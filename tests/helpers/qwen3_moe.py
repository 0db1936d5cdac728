"""Qwen3-MoE as a second row of the table of architectures: one module, as a new model needs it.

Softmax routing without a bias, norms of q and k over each head, other names of experts and other keys of config.json.
Source: transformers models/qwen3_moe, llama.cpp src/models/qwen3moe.cpp.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from mmquant.convert.models import geometry as base
from mmquant.convert.models.architecture import Architecture, ChatNotation
from mmquant.convert.models.geometry import LayerRules, read_sizes
from mmquant.convert.models.gguf import GgufFacts, Metadata, read_keys
from mmquant.convert.models.names import TensorNames

PROJECTIONS = {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}
NAMES = TensorNames(
    moe="mlp",
    plain={
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_attention_layernorm.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "router": "mlp.gate.weight",
    },
    projections=PROJECTIONS,
    sampled=("input_norm", "q_norm", "router"),
    ignore=("lm_head", r"re:.*mlp\.gate$", "re:.*embed_tokens$"),
    sglang=PROJECTIONS,
)
EXPERTS, WIDTH = "num_experts", "moe_intermediate_size"


@dataclass(frozen=True)
class Geometry(base.Geometry):
    """Sizes of a Qwen3-MoE checkpoint; norm_topk_prob: the chosen experts' scores are divided by their sum."""

    norm_topk_prob: bool = False

    @property
    def architecture(self) -> Architecture:
        return ROW

    @property
    def rules(self) -> LayerRules:
        return replace(ROW.rules, renormalize=self.norm_topk_prob)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Geometry:
        return cls(**read_sizes(config, EXPERTS, WIDTH), norm_topk_prob=bool(config.get("norm_topk_prob", False)))


def gguf_config(metadata: Metadata) -> dict[str, Any]:
    return {**read_keys(metadata, "qwen3moe", "softmax", EXPERTS, WIDTH), "norm_topk_prob": True}


def _calls(functions: list[dict[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(function)}\n</tool_call>" for function in functions)


ROW = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    geometry=Geometry.from_config,
    names=NAMES,
    rules=LayerRules(scoring="softmax", qk_norm="head"),
    experts_key=EXPERTS,
    gguf=GgufFacts(arch="qwen3moe", pre="qwen2", pattern=r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"),
    gguf_config=gguf_config,
    code_files=(),
    chat=ChatNotation(_calls, lambda text: f"<think>\n{text}\n</think>\n\n", "\n".join),
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 999,  # of dense layers: there are none
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 32,  # all of it; the base config of the tiny model says otherwise
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 2048,  # the demo's tokenizer
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
