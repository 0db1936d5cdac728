"""Folders computed from statistics, in any format of `convert/formats` that takes codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmquant.errors import InputError
from mmquant.monitor import counted
from mmquant.stages import stage

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.folder.kinds import Kind
from ...convert.folder.packing import batch_tensors, matrix_tensors
from ...convert.folder.variant import plain_tensors
from ...convert.folder.weights import WeightsVariant
from ...convert.formats.format import Format
from ...convert.formats.spec import TensorSpec
from ...convert.models.layer import LayerWeights
from ...convert.models.names import ATTENTION, TensorNames
from ...convert.models.shapes import plain_shapes
from ...quantize.fp8 import cache_scale
from ...quantize.integer.gptq_grid import GptqGrid
from ..model.distributed import world
from ..statistics.layer import LayerStatistics, without_second
from ..statistics.provider import LayerInputs
from .high import ReferenceStream, SignRoundOptions, sign_round_layer, streams
from .layer import QuantizedLayer, as_read_back, carried_layer, quantize_layer, with_attention
from .options import LayerOptions

HEADROOM = 2.0  # of inputs over the largest that calibration saw: block scales are floats, it costs them nothing
TINY = torch.finfo(torch.float32).tiny
EXACT = ("router", "router_bias")  # written in float32 when changed: engines keep them so


@dataclass(frozen=True)
class CalibratedWeights(WeightsVariant):
    """By GPTQ or AWQ on the grid of its options; `report` is called with every line that the user should see."""

    options: LayerOptions = dataclasses.field(default_factory=LayerOptions)
    report: Callable[[str], None] = print
    learning: SignRoundOptions = dataclasses.field(default_factory=SignRoundOptions)
    streams: Path | None = None  # the folder in which a killed run of learned rounding leaves the reference's stream

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        effort = "" if self.options.effort == "default" else f"-{self.options.effort}"
        return f"{self.stem}-{self.options.method}{effort}"

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        return {**super().run(), "method": self.options.method, **run_settings(self.options, self.learning)}

    @property
    def router_changes(self) -> bool:
        """Whether the router is rewritten (AWQ compensates it, high effort repairs it), then in float32."""
        return self.options.method == "awq" or self.options.sign_rounded

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        specs = super().specs(source, layer)
        return exact_specs(specs, source.names, layer) if self.router_changes else specs

    def calibrated_layer(
        self, source: Checkpoint, inputs: LayerInputs, device: torch.device | str
    ) -> tuple[dict[str, Tensor], LayerWeights | None]:
        """`made_layer`."""
        return made_layer(self, source, inputs, device)

    def packed(
        self, source: Checkpoint, inputs: LayerInputs, quantized: QuantizedLayer, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The tensors of `specs`."""
        layer, weights = inputs.layer, inputs.weights
        tensors = plain_tensors(source, plain_shapes(source.geometry, layer))
        if self.router_changes:
            tensors |= {name: tensors[name].float() for name in exact_names(source.names, layer)}
        tensors |= plain_changes(source.names, layer, quantized, tensors)
        tensors |= self._attention(source, layer, weights, quantized, device)
        if quantized.experts:
            tensors |= self.packed_experts(quantized, source.names, layer)
        else:
            tensors |= self.carried_experts(source, layer, device)
        if self.kv_cache == "fp8":
            tensors |= cache_scales(source.names, inputs.statistics, quantized.values)
        if self.activations != 16:
            tensors |= input_scales(source.names, self.storage, inputs.statistics, quantized)
        return tensors

    def solved(self, inputs: LayerInputs, source: Checkpoint) -> QuantizedLayer:
        """Codes of what is on a grid in this layer."""
        layer, weights, statistics, g = inputs.layer, inputs.weights, inputs.statistics, source.geometry
        if not self.kinds:
            options = self.options if layer not in self.eight_bit else with_bits(self.options, self.bits_of(layer))
            return quantize_layer(layer, weights, statistics, options, g)
        experts, attention = self.kinds[layer]
        done, options = carried_layer(layer, weights), dataclasses.replace(self.options, attention=False)
        if experts.calibrated:
            done = quantize_layer(layer, weights, statistics, on_kind(options, experts), g)
        if attention.calibrated:
            grid = on_kind(options, attention).grid
            chosen = dataclasses.replace(options, attention=True, attention_grid=grid)
            done = with_attention(done, weights, statistics, chosen, g)
        return done

    def _attention(
        self,
        source: Checkpoint,
        layer: int,
        weights: LayerWeights,
        quantized: QuantizedLayer,
        device: torch.device | str,
    ) -> dict[str, Tensor]:
        """The attention tensors of one layer."""
        if not quantized.attention and self.attention_scheme(source, layer) is not None:
            return self.carried_attention(source, layer, device)
        tensors: dict[str, Tensor] = {}
        for projection in ATTENTION:
            name = source.names.attention(layer, projection)
            if projection in quantized.attention:
                tensors |= matrix_tensors(self.storage, name, quantized.attention[projection])
            else:  # the layer's own matrices, read already
                matrix = getattr(weights, projection.removesuffix("_proj"))
                tensors[name + ".weight"] = matrix.to(torch.bfloat16).cpu()
        return tensors

    def packed_experts(self, quantized: QuantizedLayer, tensor_names: TensorNames, layer: int) -> dict[str, Tensor]:
        """The expert tensors of one layer."""
        tensors: dict[str, Tensor] = {}
        for projection, batch in quantized.experts.items():
            names = [tensor_names.expert(layer, expert, projection) for expert in range(len(batch.codes))]
            tensors |= batch_tensors(self.storage, names, batch)
        return tensors


class Calibrated(Protocol):
    """A variant whose layers are computed from statistics."""

    @property
    def options(self) -> LayerOptions:
        """How a layer is solved."""
        ...

    @property
    def learning(self) -> SignRoundOptions:
        """How rounding is learned, with high effort."""
        ...

    @property
    def streams(self) -> Path | None:
        """Where learning keeps its streams."""
        ...

    @property
    def report(self) -> Callable[[str], None]:
        """Takes lines that a user should see."""
        ...

    def solved(self, inputs: LayerInputs, source: Checkpoint) -> QuantizedLayer:
        """Codes of what is on a grid in this layer."""
        ...

    def packed(
        self, source: Checkpoint, inputs: LayerInputs, quantized: QuantizedLayer, device: torch.device | str
    ) -> dict[str, Tensor]:
        """The tensors of `specs`."""
        ...


def made_layer(
    variant: Calibrated, source: Checkpoint, inputs: LayerInputs, device: torch.device | str
) -> tuple[dict[str, Tensor], LayerWeights | None]:
    """The tensors of a layer's `specs`, and the layer as it will be read back, where the pass continues with it.

    Every rank must call it; only the first gets tensors.
    """
    weights = inputs.weights
    with stage("solve"):
        quantized = variant.solved(inputs, source)
    # Learning needs the memory of the second moments; whoever called handed them over with `inputs`.
    inputs = dataclasses.replace(inputs, statistics=without_second(inputs.statistics))
    if variant.options.sign_rounded:
        with stage("learn"):
            quantized = learned(source, inputs, quantized, (variant.learning, variant.streams), variant.report)
    for line in quantized.report.lines():
        variant.report(line)
    for kind, count in quantized.report.counts().items():
        counted(kind, count)
    read_back = as_read_back(weights, quantized) if inputs.continued else None
    first = world()[0] == 0  # the rank that writes
    with stage("encode"):
        return variant.packed(source, inputs, quantized, device) if first else {}, read_back


def run_settings(o: LayerOptions, learning: SignRoundOptions) -> dict[str, Any]:
    """What of these options decides the bytes."""
    settings = {"effort": o.effort, "damping": o.damping, "shrinkage": o.shrinkage, "seed": o.seed}
    settings |= {"prior": o.prior, "floor": o.floor, "sampling": o.sampling}
    return {**settings, "steps": learning.steps, "tokens": learning.tokens} if o.sign_rounded else settings


def exact_specs(specs: list[TensorSpec], names: TensorNames, layer: int) -> list[TensorSpec]:
    """A layer's tensors when its router changes."""
    exact = exact_names(names, layer)
    return [TensorSpec(s.name, "F32", s.shape) if s.name in exact else s for s in specs]


def plain_changes(
    names: TensorNames, layer: int, quantized: QuantizedLayer, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Norms, router and bias that a layer's result replaces, in the dtypes in which they are written."""
    found: dict[str, Tensor] = {}
    for field, value in quantized.plain.items():
        name = names.prefix(layer) + names.plain[field]
        found[name] = value.cpu() if field in EXACT else value.cpu().to(tensors[name].dtype)
    return found


def learned(
    source: Checkpoint,
    inputs: LayerInputs,
    first: QuantizedLayer,
    how: tuple[SignRoundOptions, Path | None],
    report: Callable[[str], None],
) -> QuantizedLayer:
    """The layer after learned rounding, on the streams that enter it; how: settings, and where streams are kept."""
    if inputs.hidden is None:
        raise InputError("effort high works on the calibration tokens; stored statistics hold only sums")
    options, folder = how
    stream: ReferenceStream = inputs.kept.setdefault("reference", ReferenceStream(folder))
    reference = stream.enter(source, inputs.layer, inputs.hidden, inputs.weights.gate)
    both = streams(reference, inputs.hidden, options, inputs.weights.gate.device)
    found, losses = sign_round_layer(inputs.weights, source.geometry, first, both, options)
    report(f"layer {inputs.layer}: " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
    return found


def input_scales(
    names: TensorNames, row: Format, statistics: LayerStatistics, quantized: QuantizedLayer
) -> dict[str, Tensor]:
    """The scales of FP4 activations, with HEADROOM over the largest input that was seen, of what is on the grid.

    All experts of a layer have the same input, so gate and up of all have one scale; down's are each expert's own, an
    expert that saw nothing has the largest. q, k and v share one.
    """
    assert row.input_scale is not None
    layer = statistics.layer
    entering, between = (m.amax.cpu() for m in (statistics.expert_in, statistics.expert_mid))
    between = torch.ldexp(between, -quantized.mid_power.cpu())
    between = torch.where(between > 0, between, between.max())
    by_name = {}
    for expert in range(len(entering) if quantized.experts else 0):
        by_name |= {names.expert(layer, expert, p): entering.max() for p in ("gate", "up")}
        by_name[names.expert(layer, expert, "down")] = between[expert]
    if quantized.attention:
        ends = [m.amax.cpu().max() for m in (statistics.attention_in, statistics.attention_out)]
        by_name |= {names.attention(layer, p): ends[p == "o_proj"] for p in ATTENTION}
    if not by_name:
        return {}
    tensors: dict[str, Tensor] = {}
    scales = row.input_scale(HEADROOM * torch.stack(list(by_name.values())).clamp(min=TINY))
    for suffix, values in scales.items():
        tensors |= {f"{name}.{suffix}": value for name, value in zip(by_name, values.unbind(), strict=True)}
    return tensors


def with_bits(options: LayerOptions, bits: int) -> LayerOptions:
    """The same on an integer grid of other bits."""
    return dataclasses.replace(options, grid=dataclasses.replace(options.integers, bits=bits))


def on_kind(options: LayerOptions, kind: Kind) -> LayerOptions:
    """The same on the grid of a plan's kind: integers of its bits and group; FP4 has one grid."""
    if not isinstance(options.grid, GptqGrid):
        return options
    return dataclasses.replace(options, grid=dataclasses.replace(options.grid, bits=kind.bits, group_size=kind.group))


def exact_names(names: TensorNames, layer: int) -> list[str]:
    """The tensors of a layer that are written in float32 when the router changes."""
    return [names.prefix(layer) + names.plain[field] for field in EXACT if field in names.plain]


def cache_scales(names: TensorNames, statistics: LayerStatistics, values: Tensor | None) -> dict[str, Tensor]:
    """k_scale and v_scale of a layer [1]; values: what the artifact divides v's channels by (None: nothing)."""
    keys, seen = statistics.kv_amax.cpu()
    seen = seen if values is None else seen / values.cpu()
    return {
        names.attention(statistics.layer, "k_proj") + ".k_scale": cache_scale(keys),
        names.attention(statistics.layer, "v_proj") + ".v_scale": cache_scale(seen),
    }
