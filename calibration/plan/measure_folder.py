"""Measure a model's sensitivity for a folder of safetensors: the same probes, on the grids of that format.

A live pass collects each layer's moments. Every unit (a layer's experts, its attention) is rounded to every kind that
the format has for it, by the solver that writes folders; its error is that of the layer's output on a second text that
the moments never saw. At the probes that text goes on to the head, and gives the distance to the exact model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.folder.fp8 import fp8_tensors
from ...convert.folder.kinds import EMBEDDINGS, HEAD, Kind, PlanRow, group_name
from ...convert.folder.packing import as_values
from ...convert.models.layer import Globals, LayerWeights
from ...convert.models.names import ATTENTION
from ...convert.models.shapes import attention_shapes, expert_shape
from ...quantize.integer.grid import dequantize
from ..folder.attention import quantize_attention
from ..folder.layer import dequantize_batch, quantize_layer
from ..folder.options import LayerOptions
from ..model.distributed import check_alone
from ..model.forward import layer_forward
from ..model.hidden import HiddenStates
from ..model.stream import batch_windows
from ..statistics.collect import Collect
from ..statistics.live import LivePass, PassOptions, default_dtype
from ..statistics.provider import LayerInputs
from .grids import grid_of
from .probes import Probes
from .sensitivity import Measured

if TYPE_CHECKING:
    from ..text.corpus import Corpus

Values = dict[str, Tensor]  # field of LayerWeights -> rounded values


class FolderMeasurement:
    """A pass on its way: the corpus collects moments, judged tokens [V, T] give errors and KLDs."""

    def __init__(
        self, source: Checkpoint, corpus: Corpus, judged: Tensor, row: PlanRow, device: str, folder: Path | None = None
    ) -> None:
        """FitError when a layer needs more memory than is free."""
        check_alone("a plan")
        self.source, self.g, self.row, self.device = source, source.geometry, row, device
        chosen = PassOptions(Collect(True), "reference", device, default_dtype(device), hold=True)
        self.calibration = LivePass(source, corpus, chosen, folder=folder)
        self.judged = Probes(judged, self.g, device, batch_windows(judged.shape[1], device), folder)
        self.found: dict[str, Measured] = {}
        self.kinds = {name: row.kinds(name, self.g) for name in row.units}

    def states(self) -> dict[str, HiddenStates]:
        """What a killed measurement needs back, by name; the calibration's stream keeps itself."""
        blocks = {f"probes-{i:03d}": block.hidden for i, block in enumerate(self.judged.blocks)}
        return {"judged": self.judged.exact, **blocks}

    def probes(self, unit: str) -> tuple[str, ...]:
        """Kinds of a unit that are measured to the end; the smallest one where the row's own do not divide."""
        words = [kind.word for kind in self.kinds[unit] if kind.calibrated]
        return tuple(word for word in words if word in self.row.probes) or (words[0],)

    def begin(self) -> None:
        """The embeddings, and their probes where the format quantizes them."""
        table, batch = self.source.read(self.g.names.embed), self.judged.batch
        tokens = self.judged.tokens
        for start in range(0, len(tokens), batch):
            self.judged.exact.put(start, torch.nn.functional.embedding(tokens[start : start + batch], table).float())
        if EMBEDDINGS not in self.row.units:
            return
        chosen = self.probes(EMBEDDINGS)
        block, errors = self.judged.open([(EMBEDDINGS, word) for word in chosen]), {}
        for kind in self.kinds[EMBEDDINGS]:
            rounded = self._nearest(table, kind)
            errors[kind.word] = float((rounded - table).square().sum(1).mean())
            for start in range(0, len(tokens), batch) if kind.word in chosen else ():
                rows = torch.nn.functional.embedding(tokens[start : start + batch], rounded).float()
                block.hidden.put(chosen.index(kind.word) * len(tokens) + start, rows)
        self.found[EMBEDDINGS] = Measured(errors, {})

    def layer(self, number: int) -> None:
        """Measure one layer; all streams leave it."""
        inputs = self.calibration.layer(number)
        units = [name for name, unit in self.row.units.items() if unit.fields]
        probes = [(name, word) for name in units for word in self.probes(name)]
        block = self.judged.open([(group_name(number, name), word) for name, word in probes])
        after = self._after(inputs.weights)
        errors: dict[str, dict[str, float]] = {name: {} for name in units}
        for kind in dict.fromkeys(kind for name in units for kind in self.kinds[name]):
            using = [name for name in units if kind in self.kinds[name]]
            values = self._rounded(inputs, kind, {f for name in using for f in self.row.units[name].fields})
            for name in using:
                own = {field: values[field] for field in self.row.units[name].fields if field in values}
                place = probes.index((name, kind.word)) if (name, kind.word) in probes else None
                layer = dataclasses.replace(inputs.weights, **own)
                errors[name][kind.word] = self._error(layer, after, (block.hidden, place)) if own else 0.0
        for name in units:
            self.found[group_name(number, name)] = Measured(errors[name], {})
        self.judged.advance(inputs.weights, block)

    def finish(self) -> dict[str, Measured]:
        """The head, and what every probe costs in the end."""
        names = self.g.names
        norm, head = self.source.read(names.final_norm).to(self.device), self.source.read(names.head).to(self.device)
        heads: dict[tuple[str, str], Tensor] = {}
        if HEAD in self.row.units:
            errors: dict[str, float] = {}
            for kind in self.kinds[HEAD]:
                rounded = self._nearest(head, kind)
                errors[kind.word] = float((rounded - head).square().sum(1).mean())
                if kind.word in self.probes(HEAD):
                    heads[HEAD, kind.word] = rounded
            self.found[HEAD] = Measured(errors, {})
        for (name, word), value in self.judged.judge(Globals(norm[:0], norm, head), heads).items():
            self.found[name].kld[word] = value
        return self.found

    def _after(self, weights: LayerWeights) -> HiddenStates:
        """The exact stream as it leaves the layer."""
        exact = self.judged.exact
        after = HiddenStates(*exact.shape, folder=self.judged.folder)
        for start, hidden in exact.batches(self.judged.batch, self.device):
            after.put(start, layer_forward(weights, self.g, hidden))
        return after

    def _error(self, weights: LayerWeights, after: HiddenStates, kept: tuple[HiddenStates, int | None]) -> float:
        """Mean squared error of a token's output; kept: where the output goes on as so many-th probe."""
        total, (states, place) = 0.0, kept
        for start, hidden in self.judged.exact.batches(self.judged.batch, self.device):
            out = layer_forward(weights, self.g, hidden)
            wanted = after.all()[start : start + len(out)].to(out.device)
            total += float((out - wanted).square().sum(dtype=torch.float64))
            if place is not None:
                states.put(place * len(self.judged.tokens) + start, out)
        return total / self.judged.tokens.numel()

    def _rounded(self, inputs: LayerInputs, kind: Kind, fields: Iterable[str]) -> Values:
        """Values of a layer's matrices at a kind; nothing of a field that the kind carries exactly."""
        fields, experts = set(fields), {"gate", "up", "down"}
        if not kind.calibrated:
            return {f: v for f in fields if (v := self._carried(inputs, kind, f)) is not None}
        options, values = LayerOptions(grid=grid_of(kind)), {}
        if fields & experts:
            done = quantize_layer(inputs.layer, inputs.weights, inputs.statistics, options, self.g)
            for name, found in done.experts.items():
                values[name] = dequantize_batch(found, inputs.weights.gate.dtype)
            power = done.mid_power.view(-1, 1, 1)  # each matrix is judged alone: the exact rescaling is undone
            values |= {"up": torch.ldexp(values["up"], power), "down": torch.ldexp(values["down"], -power)}
        if fields - experts:
            solved, _, _ = quantize_attention(inputs.weights, inputs.statistics, options, self.g)
            for name, found in solved.items():
                values[name.removesuffix("_proj")] = dequantize(found.weight)[0].to(inputs.weights.q.dtype)
        return values

    def _carried(self, inputs: LayerInputs, kind: Kind, field: str) -> Tensor | None:
        """Of bfloat16 and FP8; None: exactly what the layer has."""
        value: Tensor = getattr(inputs.weights, field)
        scheme = kind.scheme(self.source)
        if scheme is None:
            return value.to(torch.bfloat16).to(value.dtype)
        names, layer = self.source.names, inputs.layer
        if field + "_proj" in ATTENTION:
            name, shape = names.attention(layer, field + "_proj"), attention_shapes(self.g)[field + "_proj"]
            if self.source.tile_of(name) is not None:
                return None
            return as_values(scheme, name, shape, fp8_tensors(self.source, name, self.device, scheme)).to(value)
        every = [names.expert(layer, expert, field) for expert in range(self.g.experts)]
        if all(self.source.tile_of(name) is not None for name in every):
            return None
        out, shape = torch.empty_like(value), expert_shape(self.g, field)
        for number, name in enumerate(every):
            out[number] = as_values(scheme, name, shape, fp8_tensors(self.source, name, self.device, scheme)).to(out)
        return out

    def _nearest(self, matrix: Tensor, kind: Kind) -> Tensor:
        if not kind.calibrated:
            return matrix.to(torch.bfloat16).float()
        return dequantize(grid_of(kind).round_nearest(matrix.float().unsqueeze(0), None))[0]
