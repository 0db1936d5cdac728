"""mlx_lm's folder computed from statistics: every module on the grid of its width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...convert.checkpoints.batches import batches
from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.folder.kinds import ATTENTION
from ...convert.folder.mlx import MlxVariant, joined
from ...convert.folder.packing import PACKED_AT_ONCE, matrix_tensors
from ...convert.folder.variant import plain_tensors
from ...convert.formats.spec import TensorSpec
from ...convert.models.layer import LayerWeights
from ...convert.models.names import PROJECTIONS
from ...convert.models.shapes import plain_shapes
from ...quantize.integer.grid import map_parts
from ..plan.grids import grid_of
from ..statistics.provider import LayerInputs
from .high import SignRoundOptions
from .layer import QuantizedLayer, quantize_layer
from .options import LayerOptions
from .variant import exact_names, exact_specs, made_layer, plain_changes, run_settings


@dataclass(frozen=True)
class CalibratedMlx(MlxVariant):
    """By GPTQ on the grids of its kinds; the fields are those of `CalibratedWeights`."""

    options: LayerOptions = dataclasses.field(default_factory=LayerOptions)
    report: Callable[[str], None] = print
    learning: SignRoundOptions = dataclasses.field(default_factory=SignRoundOptions)
    streams: Path | None = None

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        effort = "" if self.options.effort == "default" else f"-{self.options.effort}"
        return f"{self.stem}-{self.options.method}{effort}"

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        return {**super().run(), "method": self.options.method, **run_settings(self.options, self.learning)}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        specs = super().specs(source, layer)
        return exact_specs(specs, source.names, layer) if self.options.sign_rounded else specs

    def calibrated_layer(
        self, source: Checkpoint, inputs: LayerInputs, device: torch.device | str
    ) -> tuple[dict[str, Tensor], LayerWeights | None]:
        """`made_layer`."""
        return made_layer(self, source, inputs, device)

    def solved(self, inputs: LayerInputs, source: Checkpoint) -> QuantizedLayer:
        """Codes of every matrix of a layer that is on a grid."""
        layer = inputs.layer
        return quantize_layer(layer, inputs.weights, inputs.statistics, self.options_of(layer), source.geometry)

    def packed(
        self, source: Checkpoint, inputs: LayerInputs, quantized: QuantizedLayer, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The tensors of `specs`."""
        layer = inputs.layer
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        if self.options.sign_rounded:
            tensors |= {name: tensors[name].float() for name in exact_names(source.names, layer)}
        tensors |= plain_changes(source.names, layer, quantized, tensors)
        tensors |= self._attention(source, layer, quantized, device)
        for projection in PROJECTIONS:
            tensors |= self._stack(source, layer, projection, quantized)
        return tensors

    def options_of(self, layer: int) -> LayerOptions:
        """The options with the grids of one layer."""
        grids = {name: grid_of(self.kind_of(name, layer)) for name in PROJECTIONS}
        attention = self.kind_of(ATTENTION, layer)
        return dataclasses.replace(
            self.options,
            grid=grids["gate"],
            grids=tuple((name, grid) for name, grid in grids.items() if grid != grids["gate"]),
            attention=attention.storage is not None,
            attention_grid=None if attention.storage is None else grid_of(attention),
        )

    def _attention(
        self, source: Checkpoint, layer: int, quantized: QuantizedLayer, device: torch.device | str
    ) -> dict[str, Tensor]:
        row = self.kind_of(ATTENTION, layer).storage
        if row is None:
            return self.nearest_attention(source, layer, device)
        found: dict[str, Tensor] = {}
        for projection, weight in quantized.attention.items():
            found |= matrix_tensors(row, source.names.attention(layer, projection), weight)
        return found

    def _stack(self, source: Checkpoint, layer: int, projection: str, quantized: QuantizedLayer) -> dict[str, Tensor]:
        """All experts of one projection."""
        row, weight = self.kind_of(projection, layer).storage, quantized.experts[projection]
        assert row is not None
        assert row.pack is not None
        parts: list[dict[str, Tensor]] = []
        for some in batches(source.geometry.experts, PACKED_AT_ONCE):
            names = [source.names.expert(layer, expert, projection) for expert in some]
            part = map_parts(weight, lambda values, some=some: values[some.start : some.stop])
            parts.append(row.pack(names, part))
        return joined(source.names.stack(layer, projection), parts)
