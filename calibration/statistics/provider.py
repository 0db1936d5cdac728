"""Interface that gives a quantizer the statistics of one layer, from a live pass or from disk.

Two providers exist: stored statistics (`mmquant calibrate --out`, read back) and a live pass, which runs the reference
forward and hands each layer over before it moves on, storing nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.folder.variant import FolderVariant
from ...convert.models.layer import LayerWeights
from ..model.hidden import HiddenStates
from .layer import LayerStatistics


@dataclass(frozen=True)
class LayerInputs:
    """One layer as a calibrated quantizer sees it.

    `hidden` is the residual stream that enters the layer (for learned rounding); None when statistics were stored.
    `continued`: the provider wants the quantized layer back (`quantized`), for the next layer's statistics.
    `kept`: what the quantizer keeps from layer to layer by name; of this pass alone, so that no run sees another's.
    """

    layer: int
    weights: LayerWeights
    statistics: LayerStatistics
    hidden: HiddenStates | None
    continued: bool = False
    kept: dict[str, Any] = field(default_factory=dict)


class Provider(Protocol):
    """Hands out layers in increasing order; a run that continues may start at a later one."""

    def run(self) -> dict[str, Any]:
        """What identifies the statistics: corpus and settings fingerprints, for the run's identity and provenance."""
        ...

    def layer(self, layer: int) -> LayerInputs:
        """The layer's weights and statistics; earlier layers that were not asked for are passed through."""
        ...

    def quantized(self, layer: int, weights: LayerWeights) -> None:
        """The quantized layer's values, for `--propagate quantized`; ignored otherwise."""
        ...

    def settle(self) -> None:
        """Wait until the streams that a run would continue from are durable."""
        ...

    def stop(self) -> None:
        """Save nothing more: the run has failed or ended."""
        ...


class CalibratedVariant(FolderVariant, Protocol):
    """A folder artifact whose layers are computed from statistics."""

    def calibrated_layer(
        self, source: Checkpoint, inputs: LayerInputs, device: torch.device | str
    ) -> tuple[dict[str, Tensor], LayerWeights | None]:
        """The tensors of `specs`, and the layer as it will be read back when the provider wants it."""
        ...
