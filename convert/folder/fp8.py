"""FP8 folders from a checkpoint: compressed-tensors tiles (exact from a native FP8 release) or a scale per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quantize.fp8 import quantize_channels, quantize_tiles, round_up_bfloat16
from ..checkpoints.checkpoint import Checkpoint
from ..models.minimax_m2 import matrix_shapes, plain_shapes
from . import compressed_tensors as ct
from .variant import plain_specs, plain_tensors
from .writer import TensorSpec

TILE = (128, 128)


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
            if self.scheme == "channel":
                specs.extend(ct.fp8_channel_specs(name, shape))
            elif source.is_quantized(name):
                assert source.tile is not None
                dtype = source.tensors[name + ".weight_scale_inv"].dtype
                specs.extend(ct.fp8_block_specs(name, shape, source.tile, dtype))
            else:
                specs.extend(ct.fp8_block_specs(name, shape, TILE, "BF16"))
        return specs

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        for name, _ in matrix_shapes(source.geometry, layer):
            codes, scales = self._matrix(source, name, device)
            tensors[name + ".weight"], tensors[name + ".weight_scale"] = codes, scales
        return tensors

    def _matrix(self, source: Checkpoint, name: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
        if self.scheme == "channel":
            codes, scales = quantize_channels(source.read(name + ".weight").to(device))
            return codes, scales.to(torch.bfloat16)
        if source.is_quantized(name):
            codes, scales = source.native(name)
            return codes, scales.to(source.scale_dtype(name))
        codes, scales = quantize_tiles(source.read(name + ".weight").to(device), TILE, round_up_bfloat16)
        return codes, scales.to(torch.bfloat16)

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        if self.scheme == "channel":
            groups = {ct.FP8_CHANNEL: ct.fp8_channel_group(["Linear"])}
        else:
            groups = {ct.FP8_BLOCK: ct.fp8_block_group(["Linear"], source.tile or TILE)}
        return ct.quantization_config(groups, "float-quantized")
