"""Write a GGUF file with --effort fast: search under the diagonals of the reference stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.gguf.names import OUTPUT
from ...convert.gguf.plan import GgufPlan
from ...convert.gguf.writer import TensorInfo
from ...convert.models.layer import LayerWeights
from ...quantize.ggml.types import GGMLType
from ..model.distributed import sum_everywhere, world
from ..model.divided import from_owner
from ..model.forward import rms_norm
from ..model.stream import Stream, Streaming
from ..statistics.collect import Collect
from ..statistics.layer import LayerStatistics
from ..statistics.layer_pass import calibrate_layer, plan_moments, sum_over_ranks
from ..statistics.live import default_dtype
from .encode import Matrices, encode_nearest, encode_tensors
from .memory import text_batch
from .provider import TensorProvider
from .run_stored import INPUT_OF, encode_matrices_of, stem_of
from .solve import METHODS, Report

DIAGONALS = Collect(full=False)


class FastPass(Streaming):
    """The reference's stream and the diagonals of the layer that it has left; for any number of runs on one text.

    The stream is kept in `folder` as it enters each layer.
    """

    def __init__(self, source: Checkpoint, tokens: Tensor, device: torch.device | str, folder: Path) -> None:
        """tokens [W, T] int64."""
        self.source, self.tokens, self.device, self.folder = source, tokens, device, folder
        self._found: tuple[LayerWeights, LayerStatistics] | None = None
        self._layer = -1
        self._reached: dict[int, int] = {}

    def make_stream(self) -> Stream:
        """As it enters the first layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        batch, dtype = text_batch(self.tokens.shape[1], self.device), default_dtype(self.device)
        return Stream(self.source, self.tokens, device=self.device, dtype=dtype, batch=batch, folder=self.folder)

    def layer(self, layer: int) -> tuple[LayerWeights, LayerStatistics]:
        """A layer's weights and statistics; the stream, which no layer enters twice, leaves it."""
        if self._found is None or self._layer != layer:
            self._found = None
            if self.stream.layer != layer:
                self.stream.start(layer)
            weights, domain = self.stream.read_layer(layer), torch.zeros(len(self.stream.own), dtype=torch.int64)
            plan = plan_moments(self.source.geometry, DIAGONALS, 0)
            found = calibrate_layer(self.stream, weights, domain, 1, DIAGONALS, plan)
            self._found = weights, sum_over_ranks(found)
            self._layer = layer
        return self._found

    def after_layers(self) -> Stream:
        """The stream behind the last layer."""
        if self.stream.layer != self.source.geometry.layers:
            self.stream.start(self.source.geometry.layers)
        return self.stream

    def save(self, step: int) -> None:
        """Keep the stream as it leaves the layer before `step`, which a run has just reached."""
        if 1 < step <= self.source.geometry.layers + 1:
            self.stream.save()

    def reach(self, user: int, step: int) -> None:
        """A run does `step` next: what lies before every run's goes."""
        self._reached[user] = step
        if "stream" in self.__dict__:
            self.stream.keep_from(min(self._reached.values()) - 1)

    def release(self) -> None:
        """Nobody asks for the layer any more."""
        self._found = None


class FastRun(TensorProvider):
    """The tensors of `plan`, each searched under the diagonals of one stream (`passes`, which other runs may share)."""

    def __init__(
        self,
        source: Checkpoint,
        plan: GgufPlan,
        tokens: Tensor,
        device: torch.device | str,
        folder: Path,
        passes: FastPass | None = None,
    ) -> None:
        """tokens [W, T] int64."""
        self.source, self.plan, self.device, self.report = source, plan, device, Report()
        self.passes = passes or FastPass(source, tokens, device, folder)

    def begin(self, step: int) -> None:
        """The stream as it enters the layer of `step`: from the embedding, from its file, or by replaying layers."""
        self.passes.reach(id(self), step if step < len(self.plan.steps) else 1 << 30)

    def tensors(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        layer, infos = self.plan.layer(step), self.plan.steps[step]
        ready = {} if layer is None else self._layer(layer, infos)
        importance = self._head_importance() if any(info.name == OUTPUT for info in infos) else None
        if world()[0] != 0:  # the first rank writes
            return
        for info in infos:
            if info.name in ready:
                yield info.name, ready[info.name]
            elif info.name == OUTPUT:
                yield info.name, encode_nearest(Matrices(self.source, info), self.device, importance)
            else:
                yield from encode_tensors(self.source, [info], self.device)

    def save(self, step: int) -> None:
        """The stream as it leaves the layer before `step`."""
        self.passes.save(step)

    def settle(self) -> None:
        """Wait until it is durable."""
        self.passes.settle()

    def stop(self) -> None:
        """Save nothing more."""
        self.passes.stop()

    def forget(self, step: int) -> None:
        """Delete the streams that entered the layers up to that of `step`, unless another run needs them."""
        self.passes.reach(id(self), step + 1 if step + 1 < len(self.plan.steps) else 1 << 30)

    def _layer(self, layer: int, infos: Sequence[TensorInfo]) -> dict[str, np.ndarray]:
        """Bytes of a layer's matrices by name."""
        weights, statistics = self.passes.layer(layer)
        names = {stem: info for info in infos if (stem := stem_of(info.name)) in INPUT_OF}
        kinds = {stem: GGMLType[info.type] for stem, info in names.items()}
        moments = {stem: getattr(statistics, INPUT_OF[stem]) for stem in names}
        made = encode_matrices_of(weights, moments, kinds, METHODS["fast"], layer, self.report)
        return {info.name: made[stem] for stem, info in names.items()}

    def _head_importance(self) -> Tensor:
        """[H] mean square of what the head sees."""
        stream = self.passes.after_layers()
        norm = from_owner(lambda: self.source.read(self.source.geometry.names.final_norm)).to(stream.device)
        total, rows = torch.zeros_like(norm), 0
        for _, hidden in stream.hidden.batches(stream.batch, stream.device):
            x = rms_norm(hidden, norm, self.source.geometry.norm_eps).flatten(0, 1)
            total, rows = total + x.square().sum(0), rows + len(x)
        return sum_everywhere(total) / sum_everywhere(torch.tensor(rows))
