"""A GGUF variant before its values are known: types, sizes, parts and metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..fit import Weights
from ..models.minimax_m2 import Geometry
from ..source import Source
from .metadata import Importance, Metadata, model_metadata, provenance_keys
from .mixes import Mix, tensor_types
from .names import EXPERT_TENSORS, split_block, step_shapes
from .writer import PART_BYTES, Part, TensorInfo, plan_parts


@dataclass(frozen=True)
class GgufVariant:
    """What is asked for: a stock mix, changed by overrides or a plan; `importance`: whether calibration steers the
    codes.

    stem      name of the file without .gguf
    settings  whatever else decides the bytes, in words; recorded as mmquant.* and in the manifest
    """

    mix: Mix
    stem: str
    importance: bool
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()
    plan: dict[str, str] | None = None
    part_bytes: int = PART_BYTES
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"GGUF-{self.mix.name}" + ("-custom" if self.plan or self.overrides else "")

    def steps(self, geometry: Geometry) -> list[list[TensorInfo]]:
        """The tensors of every step in writing order: embeddings, each layer, final norm and head."""
        types = tensor_types(self.mix, geometry, importance=self.importance, overrides=self.overrides, plan=self.plan)
        return [[TensorInfo(n, s, types[n]) for n, s in step.items()] for step in step_shapes(geometry)]

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        overrides = [f"{pattern.pattern}={kind}" for pattern, kind in self.overrides]
        return {
            "command": "gguf",
            "type": self.mix.name,
            "name": self.stem,
            "tensor_types": overrides,
            "plan": self.plan,
            **self.settings,
        }

    def parts(self, source: Source, calibration: Importance | None) -> list[Part]:
        """The files with their headers."""
        metadata = self.metadata(source, calibration)
        tensors = tuple(tensor for step in self.steps(source.geometry) for tensor in step)
        return plan_parts(self.stem, metadata, tensors, self.part_bytes)

    def metadata(self, source: Source, calibration: Importance | None) -> Metadata:
        """All keys of the first file."""
        name = self.stem.removesuffix(f"-{self.mix.name}")
        keys = model_metadata(source, name, self.mix.file_type, calibration)
        return keys | provenance_keys(source, self.settings)

    def weights(self, geometry: Geometry) -> Weights:
        """Bytes by kind, for the manifest."""
        sizes = [0] * geometry.layers
        total = 0
        for tensor in (tensor for step in self.steps(geometry) for tensor in step):
            layer, rest = split_block(tensor.name)
            total += tensor.bytes
            if layer is not None and rest.removesuffix(".weight") in EXPERT_TENSORS:
                sizes[layer] += tensor.bytes
        return Weights(total - sum(sizes), tuple(sizes))
