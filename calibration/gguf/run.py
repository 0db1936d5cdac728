"""Write a calibrated GGUF file in one pass: both residual streams advance with the writer.

Interrupted, it continues at its layer with the same bytes: the streams are kept on disk (raw float32) as they enter the
layer that is next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import naming
from mmquant.monitor import current, phase

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.files.atomic import whole_file
from ...convert.files.progress import damaged
from ...convert.gguf.metadata import Importance
from ...convert.gguf.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from ...convert.gguf.variant import GgufVariant
from ...convert.gguf.writer import GgufWriter, TensorInfo
from ...convert.models.minimax_m2 import EMBED, FINAL_NORM, HEAD, Geometry
from ...convert.source import read_layer
from ...quantize.ggml.codec import decode
from ...quantize.ggml.types import GGMLType
from ..model.hidden import RAM_LIMIT, HiddenStates, check_activations, leaving
from ..statistics.live import default_dtype
from .encode import Matrices, encode_nearest
from .layer import quantize_head, quantize_layer
from .memory import moment_memory, stream_place, text_batch
from .solve import METHODS, Report
from .streams import Streams


@dataclass(frozen=True)
class Calibration:
    """The text's windows [W, T] int64, how it is described (corpus fingerprint and so on), and the effort's name."""

    tokens: Tensor
    description: Mapping[str, Any]
    name: str
    effort: str = "default"

    def run(self) -> dict[str, Any]:
        """What of the calibration decides the bytes."""
        return {"calibration": dict(self.description), "effort": self.effort}

    def importance(self, geometry: Geometry) -> Importance:
        """The quantize.imatrix.* keys: nothing was read from a file, but the same kind of knowledge is in the codes."""
        return Importance("mmquant", self.name, geometry.layers * 7, self.tokens.shape[0])


@dataclass(frozen=True)
class MemoryPlan:
    """Windows in a batch, where the streams lie, and the bytes that moments may take."""

    batch: int
    place: torch.device
    moments: int


def plan_memory(g: Geometry, windows: int, length: int, device: torch.device | str) -> MemoryPlan:
    """How a calibrated run of `windows` x `length` tokens shares what is free now. FitError when it is too little."""
    dtype = default_dtype(device)
    size, batch = 2 * 4 * windows * length * g.hidden, text_batch(length, device)
    held = size if torch.device(device).type == "cpu" and size <= 2 * RAM_LIMIT else 0
    memory = moment_memory(g, dtype, device, batch * length, held)
    place = stream_place(g, device, memory, size)
    memory -= 0 if place.type == "cpu" else size
    return MemoryPlan(batch, place, memory)


class CalibratedRun:
    """Writes what is missing of one file; `report` says what was done beyond rounding."""

    def __init__(
        self,
        source: Checkpoint,
        variant: GgufVariant,
        writer: GgufWriter,
        calibration: Calibration,
        device: torch.device | str,
    ) -> None:
        self.source, self.writer, self.calibration, self.device = source, writer, calibration, device
        self.method = METHODS[calibration.effort]
        self.steps = variant.steps(source.geometry)
        self.types = {tensor.name: tensor.type for step in self.steps for tensor in step}
        self.label, self.report = variant.label, Report()
        self.dtype = default_dtype(device)
        g, (windows, length) = source.geometry, calibration.tokens.shape
        plan = plan_memory(g, windows, length, device)
        hidden = [HiddenStates(windows, length, g.hidden, folder=writer.folder, device=plan.place) for _ in range(2)]
        self.streams = Streams(hidden[0], hidden[1], plan.batch, device, plan.moments)

    def write(self) -> None:
        """All steps from the first that is missing."""
        first = self._restore()
        with phase(self.label, len(self.steps), "step", first) as bar:
            for step in range(first, len(self.steps)):
                data = self._values(step)
                for tensor in self.steps[step]:
                    self.writer.write(tensor.name, data.pop(tensor.name))
                self._save(step + 1)
                self.writer.checkpoint()
                self._drop(step)
                for line in self.report.of_layer(step - 1):
                    current().message(line)
                bar.advance()

    def _values(self, step: int) -> dict[str, np.ndarray]:
        g = self.source.geometry
        if step == 0:
            return {TOKEN_EMBD: self._embed()}
        if step <= g.layers:
            weights = read_layer(self.source, step - 1, self.device, self.dtype)
            with naming(f"layer {step - 1}"):
                made = quantize_layer(self.streams, weights, step - 1, self.types, g, self.method, self.report)
            self._check_streams(step - 1)
            return made
        norm = self.source.read(FINAL_NORM).to(self.device)
        head = quantize_head(self.streams, self.source.read(HEAD).to(self.device), norm, self.types, g, self.method)
        return {OUTPUT_NORM: norm.float().cpu().numpy(), OUTPUT: head}

    def _check_streams(self, layer: int) -> None:
        """InputError where the model, or what was made of it, left finite numbers."""
        for label, hidden in ((self.source.label, self.streams.reference), (self.label, self.streams.written)):
            for start, values in hidden.batches(self.streams.batch, self.streams.device):
                check_activations(values, leaving(label, layer), start)

    def _embed(self) -> np.ndarray:
        """The embeddings' bytes; both streams begin."""
        info = self.steps[0][0]
        stored = encode_nearest(Matrices(self.source, info), self.device)
        reference = self.source.read(EMBED)
        for start in range(0, self.streams.reference.shape[0], self.streams.batch):
            tokens = self.calibration.tokens[start : start + self.streams.batch]
            rows = torch.from_numpy(stored[tokens.flatten().numpy()])
            written = decode(rows, GGMLType[info.type], info.shape[-1]).view(*tokens.shape, -1)
            self.streams.put(start, torch.nn.functional.embedding(tokens, reference), written)
        return stored

    def _paths(self, step: int) -> tuple[Path, Path]:
        folder = self.writer.folder
        return folder / f".hidden-{step:03d}-reference", folder / f".hidden-{step:03d}-written"

    def _save(self, step: int) -> None:
        """Both streams as they enter `step`, durable before the writer says that it got there."""
        if step == len(self.steps):
            return
        for path, hidden in zip(self._paths(step), (self.streams.reference, self.streams.written), strict=True):
            with whole_file(path) as file:
                for _, values in hidden.batches(self.streams.batch):
                    file.write(values.numpy().data)

    def _drop(self, step: int) -> None:
        for path in self._paths(step):
            path.unlink(missing_ok=True)

    def _restore(self) -> int:
        """The first missing step, with the streams that enter it. InputError when they are not there."""
        step = first_step(self.steps, self.writer.done)
        if step == 0 or step == len(self.steps):
            return step
        paths = self._paths(step)
        for path in paths:
            size = path.stat().st_size if path.is_file() else "no file"
            if size != self.streams.reference.bytes:
                raise damaged(path, str(size), f"{self.streams.reference.bytes} bytes that the run left")
        for path, hidden in zip(paths, (self.streams.reference, self.streams.written), strict=True):
            values = np.memmap(path, dtype=np.float32, mode="r", shape=hidden.shape)
            for start in range(0, hidden.shape[0], self.streams.batch):
                hidden.put(start, torch.from_numpy(values[start : start + self.streams.batch].copy()))
        return step


def first_step(steps: list[list[TensorInfo]], done: int) -> int:
    """The step that holds the first tensor not written yet; steps are written whole."""
    for index, step in enumerate(steps):
        if done < len(step):
            assert done == 0, f"step {index} is half written"
            return index
        done -= len(step)
    return len(steps)
