"""FP8 folders: compressed-tensors tiles (exact from a native FP8 release) or one scale per channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quantize.fp8 import quantize_channels, quantize_tiles, round_up_bfloat16
from ..checkpoints.checkpoint import Checkpoint
from ..models.minimax_m2 import matrix_shapes, plain_shapes
from . import compressed_tensors as ct
from .variant import plain_specs, plain_tensors
from .writer import DTYPE_NAMES, TensorSpec

TILE = (128, 128)


def _kept(source: Checkpoint, name: str, channels: bool) -> bool:
    """Whether the source stores a matrix as it is to be written: its codes and scales are carried as they are."""
    return source.has_channels(name) if channels else source.tile_of(name) is not None


def fp8_specs(source: Checkpoint, name: str, shape: tuple[int, int], channels: bool) -> Iterator[TensorSpec]:
    """Tensors of a matrix [O, I] in FP8 with a scale a channel, or in tiles (the source's own size)."""
    dtype = DTYPE_NAMES[source.scale_dtype(name)] if _kept(source, name, channels) else "BF16"
    if channels:
        return ct.fp8_channel_specs(name, shape, dtype)
    return ct.fp8_block_specs(name, shape, source.tile or TILE, dtype)


def fp8_tensors(source: Checkpoint, name: str, device: torch.device | str, channels: bool) -> dict[str, Tensor]:
    """Values of the same tensors."""
    if _kept(source, name, channels):
        codes, scales = source.native(name)
        return {name + ".weight": codes, name + ".weight_scale": scales.to(source.scale_dtype(name))}
    weight = source.read(name + ".weight").to(device)
    tile = source.tile or TILE
    codes, scales = quantize_channels(weight) if channels else quantize_tiles(weight, tile, round_up_bfloat16)
    return {name + ".weight": codes, name + ".weight_scale": scales.to(torch.bfloat16)}


@dataclass(frozen=True)
class Fp8Variant:
    """`scheme` block (tiles) or channel, for attention and experts; router, norms, embeddings, head as they are."""

    scheme: str = "block"

    @property
    def label(self) -> str:
        return f"FP8-{self.scheme}"

    @property
    def format(self) -> str:
        return "compressed-tensors"

    def run(self) -> dict[str, Any]:
        return {"command": "fp8", "scheme": self.scheme}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        specs = plain_specs(source, plain_shapes(source.geometry, layer))
        for name, shape in matrix_shapes(source.geometry, layer):
            specs.extend(fp8_specs(source, name, shape, self.scheme == "channel"))
        return specs

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        for name, _ in matrix_shapes(source.geometry, layer):
            tensors |= fp8_tensors(source, name, device, self.scheme == "channel")
        return tensors

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        if self.scheme == "channel":
            groups = {ct.FP8_CHANNEL: ct.fp8_channel_group(["Linear"])}
        else:
            groups = {ct.FP8_BLOCK: ct.fp8_block_group(["Linear"], source.tile or TILE)}
        return ct.quantization_config(groups, "float-quantized")
