"""Folders whose experts are rounded to nearest in any format of the table; nothing is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..formats.format import Format, Scheme, check_writable, specs
from ..formats.plain import plain_spec, plain_tensor
from ..formats.spec import TensorSpec
from ..models.geometry import Geometry
from ..models.names import ATTENTION_STACKS, EXPERT_STACKS
from ..models.shapes import matrix_shapes, plain_shapes
from .packing import folder_config, stacked_tensors
from .schemes import stacks
from .variant import plain_specs, plain_tensors
from .weights import check_groups


@dataclass(frozen=True)
class NearestVariant:
    """Experts in `storage`, in groups of `group` inputs; attention too, or bfloat16. The rest as it is."""

    storage: Format
    group: int
    attention: bool = False

    @property
    def scheme(self) -> Scheme:
        """How its matrices lie in the folder."""
        return Scheme(self.storage, self.storage.bits[0], self.group, self.storage.symmetric[0])

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"{self.scheme.label or self.storage.name}-rtn"

    @property
    def format(self) -> str:
        """The manifest's format."""
        return self.storage.manifest

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        command = {"command": self.storage.command, "method": "rtn"} if self.storage.command else {}
        return {**command, "format": self.storage.name, "group_size": self.group, "attention": self.attention}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        check_writable(self.scheme)
        check_groups(source.geometry, self.group)
        found = plain_specs(source, plain_shapes(source.geometry, layer))
        for name, shape in matrix_shapes(source.geometry, layer):
            found += specs(self.scheme, name, shape) if self._rounded(name) else [plain_spec(name, shape)]
        return found

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        for names in self._stacks(source.geometry, layer):
            weights = [source.read(name + ".weight").to(device) for name in names]
            if self._rounded(names[0]):
                tensors |= stacked_tensors(self.scheme, [[name] for name in names], [w[None] for w in weights])
            else:
                for name, weight in zip(names, weights, strict=True):
                    tensors |= plain_tensor(name, weight)
        return tensors

    def _stacks(self, g: Geometry, layer: int) -> Iterator[list[str]]:
        """The names of a layer's matrices, those together that share scales."""
        for stack in stacks(self.storage, ATTENTION_STACKS):
            yield [g.names.attention(layer, projection) for projection in stack]
        for expert in range(g.experts):
            for stack in stacks(self.storage, EXPERT_STACKS):
                yield [g.names.expert(layer, expert, projection) for projection in stack]

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        """config.json's quantization_config."""
        return folder_config(self.scheme, self.attention, source.names)

    def _rounded(self, name: str) -> bool:
        return self.attention or ".experts." in name
