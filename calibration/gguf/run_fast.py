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
from ...quantize.ggml.types import GGMLType
from ..model.forward import rms_norm
from ..model.stream import Stream
from ..statistics.collector import Collect
from ..statistics.layer_pass import calibrate_layer, plan_moments
from ..statistics.live import default_dtype
from .encode import Matrices, encode_nearest, encode_tensors
from .memory import text_batch
from .provider import TensorProvider
from .run_stored import INPUT_OF, encode_matrices_of, stem_of
from .solve import METHODS, Report

DIAGONALS = Collect(full=False)


class FastRun(TensorProvider):
    """The tensors of `plan`, each searched under the diagonals of one stream.

    The stream is kept in `folder` as it enters each layer.
    """

    stream: Stream

    def __init__(
        self, source: Checkpoint, plan: GgufPlan, tokens: Tensor, device: torch.device | str, folder: Path
    ) -> None:
        """tokens [W, T] int64."""
        self.source, self.plan, self.tokens, self.device, self.folder = source, plan, tokens, device, folder
        self.report = Report()

    def begin(self, step: int) -> None:
        """The stream as it enters the layer of `step`: from the embedding, from its file, or by replaying layers."""
        batch, dtype = text_batch(self.tokens.shape[1], self.device), default_dtype(self.device)
        self.stream = Stream(self.source, self.tokens, device=self.device, dtype=dtype, batch=batch, folder=self.folder)
        if step < len(self.plan.steps):
            self.stream.start(max(0, step - 1))

    def tensors(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        layer = self.plan.layer(step)
        ready = {} if layer is None else self._layer(layer, self.plan.steps[step])
        for info in self.plan.steps[step]:
            if info.name in ready:
                yield info.name, ready[info.name]
            elif info.name == OUTPUT:
                yield info.name, encode_nearest(Matrices(self.source, info), self.device, self._head_importance())
            else:
                yield from encode_tensors(self.source, [info], self.device)

    def save(self, step: int) -> None:
        """The stream as it leaves the layer before `step`."""
        self.stream.save()

    def forget(self, step: int) -> None:
        """Delete the streams that entered the layers up to that of `step`."""
        self.stream.keep_from(step)

    def _layer(self, layer: int, infos: Sequence[TensorInfo]) -> dict[str, np.ndarray]:
        """Bytes of a layer's matrices by name; the stream leaves the layer."""
        assert self.stream.layer == layer
        weights, g = self.stream.read_layer(layer), self.source.geometry
        domain = torch.zeros(self.stream.hidden.shape[0], dtype=torch.int64)
        statistics = calibrate_layer(self.stream, weights, domain, 1, DIAGONALS, plan_moments(g, DIAGONALS, 0))
        names = {stem: info for info in infos if (stem := stem_of(info.name)) in INPUT_OF}
        kinds = {stem: GGMLType[info.type] for stem, info in names.items()}
        moments = {stem: getattr(statistics, INPUT_OF[stem]) for stem in names}
        made = encode_matrices_of(weights, moments, kinds, METHODS["fast"], layer, self.report)
        return {info.name: made[stem] for stem, info in names.items()}

    def _head_importance(self) -> Tensor:
        """[H] mean square of what the head sees."""
        assert self.stream.layer == self.source.geometry.layers
        norm = self.source.read(self.source.geometry.names.final_norm).to(self.stream.device)
        total, rows = torch.zeros_like(norm), 0
        for _, hidden in self.stream.hidden.batches(self.stream.batch, self.stream.device):
            x = rms_norm(hidden, norm, self.source.geometry.norm_eps).flatten(0, 1)
            total, rows = total + x.square().sum(0), rows + len(x)
        return total / rows
