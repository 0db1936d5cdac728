"""Release names of an architecture's tensors, and what engines call them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

PROJECTIONS = ("gate", "down", "up")  # gate, down, up: how LayerWeights and the statistics call them
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_STACKS = (("gate", "up"), ("down",))  # what engines stack along the outputs
ATTENTION_STACKS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
# Beside whatever has scale in it.
SCALES = ("qzeros", "weight_zero_point", "g_idx", "weight_g_idx", "weight_shape", "suh", "svh", "mcg", "mul1")


@dataclass(frozen=True)
class Expert:
    """The parts of an expert's name: `stem` up to its layer's number, the numbers, the key of its projection."""

    stem: str
    layer: int
    number: int
    projection: str


@dataclass(frozen=True, eq=False)
class TensorNames:
    """How an architecture names its tensors.

    moe          module of the router and the experts in a layer
    plain        field of LayerWeights -> name in a layer, in the order of the file: what is never quantized
    projections  gate, down, up -> last part of an expert's name
    sampled      fields of which a fingerprint reads the bytes, layer by layer
    ignore       compressed-tensors' skip list of a folder whose experts and attention are quantized
    sglang       gate, down, up -> last part of the name under which SGLang looks an expert up
    vllm_moe     the module as vLLM and transformers 5 call it
    mlx_experts  the module inside it in which mlx_lm stacks all experts of a projection, called as in `sglang`
    """

    moe: str
    plain: Mapping[str, str]
    projections: Mapping[str, str]
    sampled: tuple[str, ...]
    ignore: tuple[str, ...]
    sglang: Mapping[str, str]
    vllm_moe: str = "mlp"
    mlx_experts: str = "switch_mlp"
    embed: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    layers: str = "model.layers"
    attention_module: str = "self_attn"

    def prefix(self, layer: int) -> str:
        """What the names of a layer begin with."""
        return f"{self.layers}.{layer}."

    def attention(self, layer: int, projection: str) -> str:
        """Name of an attention matrix, without the suffix .weight."""
        return f"{self.layers}.{layer}.{self.attention_module}.{projection}"

    def expert(self, layer: int, expert: int, projection: str) -> str:
        """Name of an expert's matrix, without the suffix .weight."""
        return f"{self.layers}.{layer}.{self.moe}.experts.{expert}.{self.projections[projection]}"

    def stack(self, layer: int, projection: str) -> str:
        """Name of a layer's stacked experts in mlx_lm, without a suffix."""
        return f"{self.layers}.{layer}.{self.moe}.{self.mlx_experts}.{self.sglang[projection]}"

    @cached_property
    def _stack(self) -> re.Pattern[str]:
        last = "|".join(map(re.escape, self.sglang.values()))
        inside = rf"{re.escape(self.moe)}\.{re.escape(self.mlx_experts)}"
        return re.compile(rf"{re.escape(self.layers)}\.(\d+)\.{inside}\.({last})")

    def stack_of(self, name: str) -> tuple[int, str] | None:
        """(layer, projection) of a name of `stack`; None for any other."""
        match = self._stack.fullmatch(name)
        if match is None:
            return None
        return int(match[1]), next(key for key, last in self.sglang.items() if last == match[2])

    def is_expert(self, name: str) -> bool:
        """Whether a tensor is an expert's, or a stack of them."""
        return ".experts." in name or f".{self.moe}.{self.mlx_experts}." in name

    @property
    def router(self) -> str:
        """The router's module in a layer."""
        return self.plain["router"].removesuffix(".weight")

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.layers)}\.(\d+)\.")

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        last = "|".join(map(re.escape, self.projections.values()))
        return re.compile(rf"({re.escape(self.layers)}\.(\d+))\.{re.escape(self.moe)}\.experts\.(\d+)\.({last})")

    @cached_property
    def _projection(self) -> dict[str, str]:
        """By the last part of the name."""
        return {last: key for key, last in self.projections.items()}

    @cached_property
    def matrix(self) -> str:
        """A regular expression, without groups, of the names of matrices without their suffix."""
        attention = rf"{re.escape(self.attention_module)}\.[qkvo]_proj"
        inside = rf"(?:{attention}|{re.escape(self.moe)}\.experts\.\d+\.\w+|{re.escape(self.router)})"
        return rf"(?:{re.escape(self.layers)}\.\d+\.{inside}|{re.escape(self.head.removesuffix('.weight'))})"

    def layer_of(self, name: str) -> int | None:
        """Layer number in a name, None outside the layers."""
        match = self._layer.match(name)
        return int(match.group(1)) if match else None

    def expert_of(self, name: str) -> Expert | None:
        """The parts of the name (without .weight) of an expert's matrix; None for any other name."""
        match = self._expert.fullmatch(name)
        if match is None:
            return None
        return Expert(match[1], int(match[2]), int(match[3]), self._projection[match[4]])

    def kind_of(self, name: str) -> str:
        """Census kind of a tensor: expert and its projection, attention, router, norm, embedding, head, scale."""
        stem, _, part = name.rpartition(".")
        if "scale" in part or part in (*SCALES, "biases"):
            return "scale"
        if f"{stem}.weight" in (self.embed, self.head):
            return "embedding" if f"{stem}.weight" == self.embed else "head"
        if self.is_expert(name):
            return "expert " + stem.rsplit(".", 1)[-1]
        if "norm" in name:
            return "norm"
        return "attention" if f".{self.attention_module}." in name else "router"
