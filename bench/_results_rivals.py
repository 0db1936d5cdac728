"""Files of the same bytes by the rules of others: the rivals of docs/results.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from by_bytes import nearest_rule
from fp4_quality import RULES, Rule
from torch import Tensor

from mmquant.convert.gguf.imatrix import Imatrix
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, TOKEN_EMBD
from mmquant.convert.source import Source
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.types import GGMLType
from mmquant.runs.evaluation import llamacpp


def mlx_rule(mode: str, group: int, bits: int = 4) -> Rule:
    """What mlx makes of BF16 weights, as `mlx_lm.convert` asks it; nvfp4 without a scale of the whole matrix."""

    def rule(weights: Tensor) -> Tensor:
        import mlx.core as mx

        parts = mx.array(weights.flatten(0, -2).numpy()).astype(mx.bfloat16)
        stored = mx.quantize(parts, group_size=group, bits=bits, mode=mode)
        values = mx.dequantize(*stored, group_size=group, bits=bits, mode=mode).astype(mx.float32)
        return torch.from_numpy(np.array(values)).view(weights.shape)

    return rule


EXPERT_RULES: dict[str, Rule] = {
    "to nearest, largest / 7.5": nearest_rule(128),
    "by the maximum": RULES["rule: NVFP4 by the maximum"],
    "by OCP's rule": RULES["rule: MXFP4 of OCP"],
    "mlx's own rounding": mlx_rule("affine", 64),
    "mlx's own rounding, mxfp4": mlx_rule("mxfp4", 32),
    "mlx's own rounding, nvfp4": mlx_rule("nvfp4", 16),
}


class Rival:
    """The bytes of an artifact of ours with values that another rule rounded; everything else is that artifact's."""

    def __init__(self, ours: Source, truth: Source, rule: str, imatrix: Imatrix | None) -> None:
        self.ours, self.truth, self.rule, self.imatrix = ours, truth, rule, imatrix
        self.label = f"{ours.label}, {rule}"
        self.fingerprint = f"{ours.fingerprint} {rule}"
        self.is_gguf = ours.ggml_type(TOKEN_EMBD) is not None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what is not a value is the artifact's
        return getattr(self.ours, name)

    def read(self, name: str) -> Tensor:
        """A matrix outside the experts: as ggml encodes it, or as it was."""
        kind = self.ours.ggml_type(self._gguf_name(name)) if self.is_gguf else None
        if kind is None or GGMLType[kind] in (GGMLType.F32, GGMLType.BF16):
            return self.truth.read(name) if self.is_gguf else self.ours.read(name)
        return self._encoded(self._gguf_name(name), self.truth.read(name)[None], range(1))[0]

    def _gguf_name(self, name: str) -> str:
        names = self.truth.geometry.names
        outside = {names.embed: TOKEN_EMBD, names.head: OUTPUT}
        for layer in range(self.truth.geometry.layers):
            for gguf, release in ATTENTION_TENSORS.items():
                outside[names.attention(layer, release) + ".weight"] = f"blk.{layer}.{gguf}.weight"
        return outside.get(name, name)

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] by the rule; gate and up of an expert together, as engines fuse them."""
        values = self.truth.read_experts(layer, projection, experts, "cpu", torch.float32)
        if self.is_gguf:
            short = next(short for short, role in EXPERT_TENSORS.items() if role == projection)
            return self._encoded(f"blk.{layer}.{short}.weight", values, experts).to(device, dtype)
        rule = EXPERT_RULES[self.rule]
        if projection == "down":
            return rule(values).to(device, dtype)
        other = self.truth.read_experts(layer, "up" if projection == "gate" else "gate", experts, "cpu", torch.float32)
        return rule(torch.cat((values, other), 1))[:, : values.shape[1]].to(device, dtype)

    def _encoded(self, name: str, values: Tensor, experts: range) -> Tensor:
        kind = self.ours.ggml_type(name)
        assert kind is not None
        found = None if self.imatrix is None else self.imatrix.weights.get(name)
        weights = None if found is None else found.mean()
        parts = []
        for matrix, expert in zip(values, experts, strict=True):
            data = llamacpp.quantize(
                int(GGMLType[kind]), matrix.numpy(), None if weights is None else weights[expert % len(weights)]
            )
            parts.append(decode(torch.from_numpy(data), GGMLType[kind], matrix.shape[1]))
        return torch.stack(parts)
