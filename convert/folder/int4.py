"""INT4 folders by round to nearest: experts in groups, attention in bfloat16, FP8 or INT4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.rtn import rtn_int
from ..checkpoints.checkpoint import Checkpoint
from ..models.minimax_m2 import (
    ATTENTION,
    PROJECTIONS,
    Geometry,
    attention_name,
    expert_name,
    matrix_shapes,
    plain_shapes,
)
from . import compressed_tensors as ct
from .fp8 import TILE, fp8_specs, fp8_tensors
from .int4_layouts import MANIFEST_FORMAT, batch_tensors, check_format, matrix_specs, matrix_tensors, other_config
from .variant import plain_specs, plain_tensors
from .writer import TensorSpec

ATTENTION_CHOICES = ("bf16", "fp8", "fp8-channel", "int4")


def check_groups(g: Geometry, group_size: int, parallel: int = 1, attention: str = "bf16") -> None:
    """InputError when a group does not divide the inputs of a matrix, whole or split over `parallel` devices.

    Tensor parallelism splits the inputs of w2 (and of o, where attention is INT4); a group must not straddle two
    devices (vLLM refuses to load).
    """
    width = g.expert_width // parallel
    if g.expert_width % parallel:
        raise InputError(f"expert width {g.expert_width} is not a multiple of {parallel} devices")
    if group_size == -1:
        return
    works = ", ".join(str(s) for s in (32, 64, 128) if not g.hidden % s and not width % s) or "none"
    if g.hidden % group_size or g.expert_width % group_size:
        raise InputError(
            f"group size {group_size} does not divide hidden {g.hidden} and expert width {g.expert_width}; "
            f"sizes that do: {works}"
        )
    if width % group_size:
        most = max(p for p in range(1, parallel) if not g.expert_width % (p * group_size))
        raise InputError(
            f"group size {group_size}: {g.expert_width}/{parallel} = {width} is not a multiple of it; what works: "
            f"group sizes {works}, at most {most} devices, or expert parallelism (--enable-expert-parallel)"
        )

    inputs = g.heads * g.head_dim
    if attention == "int4" and inputs % (parallel * group_size):
        raise InputError(
            f"attention int4: group size {group_size} does not divide o's {inputs} inputs over {parallel} devices"
        )


@dataclass(frozen=True)
class Int4Variant:
    """Round-to-nearest with MSE-optimal scales (bfloat16 exact); needs no calibration."""

    group_size: int = 128
    attention: str = "bf16"
    bits: int = 4
    layout: str = "compressed-tensors"
    symmetric: bool = True
    eight_bit: tuple[int, ...] = ()  # layers whose experts keep 8 bits (compressed-tensors)
    kv_cache: str = "bf16"  # or fp8: calibrated scales of an FP8 cache (compressed-tensors)

    def bits_of(self, layer: int) -> int:
        """Bits of a layer's experts; attention has `bits` everywhere."""
        return 8 if layer in self.eight_bit else self.bits

    @property
    def label(self) -> str:
        return f"W{self.bits}A16-g{self.group_size}-rtn"

    @property
    def format(self) -> str:
        return MANIFEST_FORMAT[self.layout]

    def run(self) -> dict[str, Any]:
        return {
            "command": "int4",
            "method": "rtn",
            "bits": self.bits,
            "group_size": self.group_size,
            "attention": self.attention,
            "format": self.layout,
            "symmetric": self.symmetric,
            "eight_bit": list(self.eight_bit),
            "kv_cache": self.kv_cache,
        }

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        check_groups(source.geometry, self.group_size, attention=self.attention)
        check_format(self.layout, self.bits, self.attention, self.symmetric)
        check_widths(self, source.geometry)
        specs = plain_specs(source, plain_shapes(source.geometry, layer))
        for name, shape in matrix_shapes(source.geometry, layer):
            if ".experts." in name or self.attention == "int4":
                bits = self.bits_of(layer) if ".experts." in name else self.bits
                specs.extend(matrix_specs(self.layout, name, shape, bits, self.group_size, self.symmetric))
            elif self.attention == "bf16":
                specs.append(TensorSpec(name + ".weight", "BF16", shape))
            else:
                specs.extend(fp8_specs(source, name, shape, self.attention == "fp8-channel"))
        if self.kv_cache == "fp8":
            specs.extend(ct.cache_specs(attention_name(layer, "k_proj"), attention_name(layer, "v_proj")))
        return specs

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        for projection in ATTENTION:
            tensors |= self.attention_tensors(source, attention_name(layer, projection), device)
        for projection in PROJECTIONS:
            tensors |= self._experts(source, layer, projection, device)
        return tensors

    def attention_tensors(self, source: Checkpoint, name: str, device: torch.device | str) -> dict[str, Tensor]:
        """One attention matrix as this variant stores it."""
        if self.attention == "bf16":
            return {name + ".weight": source.read(name + ".weight").to(torch.bfloat16)}
        if self.attention == "int4":
            weight = source.read(name + ".weight").to(device)
            return matrix_tensors(self.layout, name, rtn_int(weight, self.bits, self.group_size, self.symmetric))
        return fp8_tensors(source, name, device, self.attention == "fp8-channel")

    def _experts(
        self, source: Checkpoint, layer: int, projection: str, device: torch.device | str
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        g = source.geometry
        step = max(1, (1 << 28) // (g.hidden * g.expert_width))  # 1 GiB of float32 weights at once
        for start in range(0, g.experts, step):
            chosen = range(start, min(start + step, g.experts))
            weights = source.read_experts(layer, projection, chosen, device, torch.float32)
            packed = rtn_int(weights, self.bits_of(layer), self.group_size, self.symmetric)
            tensors |= batch_tensors(self.layout, [expert_name(layer, e, projection) for e in chosen], packed)
        return tensors

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        if self.layout != "compressed-tensors":
            return other_config(self.layout, self.bits, self.group_size, self.attention)
        return int4_config(self, source)


def check_widths(variant: Int4Variant, g: Geometry) -> None:
    """ValueError for 8-bit layers that do not exist, or that the format or its kernels cannot hold."""
    outside = [layer for layer in variant.eight_bit if not 0 <= layer < g.layers]
    if outside:
        raise InputError(f"8-bit layer {outside[0]}: the model has layers 0 to {g.layers - 1}")
    if variant.eight_bit and (variant.layout != "compressed-tensors" or not variant.symmetric):
        raise InputError("8-bit layers: expected format compressed-tensors, symmetric (no engine reads others)")
    if variant.kv_cache == "fp8" and variant.layout != "compressed-tensors":
        raise InputError(f"format {variant.layout}: scales of an FP8 KV cache, expected format compressed-tensors")


def int4_config(variant: Int4Variant, source: Checkpoint) -> dict[str, Any]:
    """quantization_config: one group for experts (and attention), groups by width, an FP8 group beside them.

    Top level pack-quantized: SGLang refuses "mixed-precision" for INT4 experts, so every group names its own format.
    """
    v, attention = variant, variant.attention
    if attention == "int4" and not v.eight_bit:
        return ct.quantization_config(
            {ct.INT: ct.int_group(["Linear"], v.bits, v.group_size, v.symmetric)},
            "pack-quantized",
            kv_cache=v.kv_cache == "fp8",
        )
    groups = {}
    if v.eight_bit:
        groups["W8A16"] = ct.int_group([layers_target(v.eight_bit)], 8, v.group_size)
    rest = tuple(layer for layer in range(source.geometry.layers) if layer not in v.eight_bit)
    targets = [layers_target(rest)] if v.eight_bit else [ct.EXPERTS_TARGET]
    if attention == "int4":
        targets.append(ct.ATTENTION_TARGET)
    if not v.eight_bit or rest or attention == "int4":
        groups[ct.INT] = ct.int_group(targets, v.bits, v.group_size, v.symmetric)
    if attention == "fp8":
        groups[ct.FP8_BLOCK] = ct.fp8_block_group([ct.ATTENTION_TARGET], source.tile or TILE)
    if attention == "fp8-channel":
        groups[ct.FP8_CHANNEL] = ct.fp8_channel_group([ct.ATTENTION_TARGET])
    ignore = (*ct.IGNORE, ct.ATTENTION_TARGET) if attention == "bf16" else ct.IGNORE
    return ct.quantization_config(groups, "pack-quantized", ignore, v.kv_cache == "fp8")


def layers_target(layers: tuple[int, ...]) -> str:
    """A pattern for the experts of some layers that matches in vLLM (mlp.experts) and SGLang (block_sparse_moe)."""
    return rf"re:.*\.layers\.({'|'.join(str(layer) for layer in layers)})\..*experts\..*"
