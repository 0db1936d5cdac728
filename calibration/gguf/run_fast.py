"""Write a GGUF file with --effort fast: search under the diagonals of the reference stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.gguf.names import OUTPUT, split_block
from ...convert.gguf.writer import TensorInfo
from ...convert.models.minimax_m2 import FINAL_NORM
from ...quantize.ggml.types import GGMLType
from ..model.forward import rms_norm
from ..model.stream import Stream
from ..statistics.collector import Collect
from ..statistics.layer_pass import calibrate_layer, plan_moments
from ..statistics.live import default_dtype
from .encode import Matrices, encode_nearest, encode_tensors
from .memory import text_batch
from .run_stored import INPUT_OF, encode_matrices_of, stem_of
from .solve import METHODS, Report

DIAGONALS = Collect(full=False)


class FastRun:
    """Tensors of a file, step by step in order; `report` says what was done beyond rounding.

    The stream is kept in `folder` as it enters each layer, so that a killed run goes on with the same bytes.
    """

    def __init__(self, source: Checkpoint, tokens: Tensor, device: torch.device | str, folder: Path) -> None:
        """tokens [W, T] int64."""
        self.source, self.device, self.report = source, device, Report()
        batch = text_batch(tokens.shape[1], device)
        self.stream = Stream(source, tokens, device=device, dtype=default_dtype(device), batch=batch, folder=folder)

    def tensors(self, infos: list[TensorInfo]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of tensors of one step, in order."""
        layer = split_block(infos[0].name)[0]
        ready = {} if layer is None else self._layer(layer, infos)
        for info in infos:
            if info.name in ready:
                yield info.name, ready[info.name]
            elif info.name == OUTPUT:
                yield info.name, encode_nearest(Matrices(self.source, info), self.device, self._head_importance())
            else:
                yield from encode_tensors(self.source, [info], self.device)

    def _enter(self, layer: int) -> None:
        if self.stream.layer < 0:
            self.stream.start(layer)
        assert self.stream.layer == layer

    def _layer(self, layer: int, infos: list[TensorInfo]) -> dict[str, np.ndarray]:
        """Bytes of a layer's matrices by name; the stream leaves the layer."""
        self._enter(layer)
        weights, g = self.stream.read_layer(layer), self.source.geometry
        domain = torch.zeros(self.stream.hidden.shape[0], dtype=torch.int64)
        plan = plan_moments(g, DIAGONALS, 0)
        statistics = calibrate_layer(self.stream, weights, domain, 1, DIAGONALS, plan)
        self.stream.save()
        self.stream.keep_from(layer)
        names = {stem: info for info in infos if (stem := stem_of(info.name)) in INPUT_OF}
        kinds = {stem: GGMLType[info.type] for stem, info in names.items()}
        moments = {stem: getattr(statistics, INPUT_OF[stem]) for stem in names}
        made = encode_matrices_of(weights, moments, kinds, METHODS["fast"], layer, self.report)
        return {info.name: made[stem] for stem, info in names.items()}

    def _head_importance(self) -> Tensor:
        """[H] mean square of what the head sees."""
        self._enter(self.source.geometry.layers)
        norm = self.source.read(FINAL_NORM).to(self.stream.device)
        total, rows = torch.zeros_like(norm), 0
        for _, hidden in self.stream.hidden.batches(self.stream.batch, self.stream.device):
            x = rms_norm(hidden, norm, self.source.geometry.norm_eps).flatten(0, 1)
            total, rows = total + x.square().sum(0), rows + len(x)
        return total / rows
