"""Lay out the steps of a folder and make their tensors, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from mmquant.stages import stage

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.fitting.weights import Weights
from ..convert.folder.variant import FolderVariant, StoresOutside, global_specs, global_tensors
from ..convert.formats.spec import TensorSpec

if TYPE_CHECKING:
    from ..calibration.statistics.provider import CalibratedVariant, Provider


@dataclass(frozen=True)
class Prepared:
    """What a dry run shows: the steps' tensors and what they need."""

    steps: list[list[TensorSpec]]
    weights: Weights

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return self.weights.total


def prepare(source: Checkpoint, variant: FolderVariant) -> Prepared:
    """Validate the source and lay out every tensor of the artifact; nothing is written."""
    source.validate()
    outside = variant.outside_specs(source) if isinstance(variant, StoresOutside) else global_specs(source)
    layers = [variant.specs(source, layer) for layer in range(source.geometry.layers)]
    embed = source.names.embed.removesuffix(".weight")
    first = [s for s in outside if s.name.rpartition(".")[0] == embed]
    steps = [first, *layers, [s for s in outside if s not in first]]
    experts = tuple(sum(s.bytes for s in specs if source.names.is_expert(s.name)) for specs in layers)
    total = sum(s.bytes for step in steps for s in step)
    return Prepared(steps, Weights(total - sum(experts), experts))


def step_tensors(
    source: Checkpoint, variant: FolderVariant, step: int, device: torch.device | str, provider: Provider | None
) -> dict[str, torch.Tensor]:
    """Values of one step's tensors."""
    layers = source.geometry.layers
    if not 1 <= step <= layers:
        if isinstance(variant, StoresOutside):
            return variant.outside_tensors(source, step == 0, device)
        return global_tensors(source, first=step == 0)
    if provider is None:
        with stage("encode"):
            return variant.layer(source, step - 1, device)
    calibrated = cast("CalibratedVariant", variant)
    tensors, quantized = calibrated.calibrated_layer(source, provider.layer(step - 1), device)
    if quantized is not None:
        provider.quantized(step - 1, quantized)
    return tensors
