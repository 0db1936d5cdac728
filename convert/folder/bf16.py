"""BF16 folders: the release without its quantization, what fine-tuning starts from.

A value is the FP8 code times its float32 scale, rounded once to bfloat16 (at most 2^-9 of it): the release's scales are
no powers of two, so 16 bits cannot hold every product. Matrices that are not FP8, router, norms, embeddings and head
are carried as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.batches import batches
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.finite import check_finite
from ..formats.plain import plain_spec, plain_tensor
from ..formats.spec import TensorSpec
from ..models.names import ATTENTION, PROJECTIONS
from ..models.shapes import matrix_shapes, plain_shapes
from .variant import plain_specs, plain_tensors


@dataclass(frozen=True)
class Bf16Variant:
    """Every FP8 matrix in bfloat16; the rest as it is."""

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return "BF16"

    @property
    def format(self) -> str:
        """The manifest's format."""
        return "safetensors"

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        return {"command": "bf16"}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        found = plain_specs(source, plain_shapes(source.geometry, layer))
        for name, shape in matrix_shapes(source.geometry, layer):
            stored = plain_specs(source, [(name + ".weight", shape)])
            found += [plain_spec(name, shape)] if source.is_quantized(name) else stored
        return found

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        names = source.names
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        for projection in ATTENTION:
            tensors |= _matrices(source, [names.attention(layer, projection)], device)
        for projection in PROJECTIONS:
            for part in batches(source.geometry.experts):
                tensors |= _matrices(source, [names.expert(layer, e, projection) for e in part], device)
        return tensors

    def quantization_config(self, source: Checkpoint) -> None:
        """None: nothing is quantized."""
        del source


def _matrices(source: Checkpoint, names: list[str], device: torch.device | str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    quantized = [name for name in names if source.is_quantized(name)]
    if quantized:
        for name, values in zip(quantized, source.dequantized(quantized, device), strict=True):
            tensors |= plain_tensor(name, values)
    return tensors | {f"{name}.weight": source.raw(f"{name}.weight") for name in names if name not in quantized}


def check_bf16_layer(found: Checkpoint, layer: int, source: Checkpoint | None, samples: int) -> None:
    """What one layer's values are: no NaN; `samples` experts are compared with the source's. InputError."""
    for name, _ in matrix_shapes(found.geometry, layer):
        check_finite(found.raw(name + ".weight"), f"{found.label}: {name}")
    if source is not None:
        compare_bf16(found, source, samples, layer)


def compare_bf16(found: Checkpoint, source: Checkpoint, samples: int, layer: int) -> None:
    """`samples` experts of a layer bit for bit. InputError."""
    experts = found.geometry.experts
    chosen = sorted({round(i * (experts - 1) / max(1, samples - 1)) for i in range(samples)})
    for name in (found.names.expert(layer, e, projection) for e in chosen for projection in PROJECTIONS):
        written = found.raw(name + ".weight")
        if not torch.equal(written, source.read(name + ".weight").to(written.dtype)):
            raise InputError(f"{found.label}: {name} is not what the source says")
