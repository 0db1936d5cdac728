"""Calibrated GGUF tensors in one pass: both residual streams go through the layers, and the tensors with them.

An interrupted run continues at its layer with the same bytes: the streams are kept on disk as they enter the layer that
is next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import naming

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.gguf.metadata import Importance
from ...convert.gguf.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from ...convert.gguf.plan import GgufPlan
from ...convert.models.geometry import Geometry
from ...quantize.ggml.codec import decode
from ...quantize.ggml.types import GGMLType
from ..model.distributed import rank_share, rank_shares, world
from ..model.divided import from_owner
from ..model.embedded import embedded
from ..model.hidden import RAM_LIMIT, HiddenStates, check_activations, leaving
from ..model.parts import Saver, drop_parts, take_part
from ..model.reading import read_layer_shared
from ..statistics.live import default_dtype
from .encode import Matrices, encode_nearest
from .layer import head_pair, quantize_head, quantize_layer
from .memory import moment_memory, stream_place, text_batch
from .provider import TensorProvider
from .reference import SharedReference
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


def plan_memory(g: Geometry, windows: int, length: int, device: torch.device | str, others: int = 0) -> MemoryPlan:
    """How a calibrated run of `windows` x `length` tokens shares what is free now, but `others` bytes.

    FitError when it is too little.
    """
    dtype = default_dtype(device)
    size, batch = 2 * 4 * windows * length * g.hidden, text_batch(length, device)
    held = size if torch.device(device).type == "cpu" and size <= 2 * RAM_LIMIT else 0
    memory = moment_memory(g, dtype, device, batch * length, held + others)
    place = stream_place(g, device, memory, size)
    memory -= 0 if place.type == "cpu" else size
    return MemoryPlan(batch, place, memory)


class CalibratedRun(TensorProvider):
    """The tensors of `plan`, each layer quantized on what the quantized layers before it deliver.

    The quantized stream is kept in `folder` as it enters the step that is next, the reference's where `reference` keeps
    it: other runs on the same text may share that.
    """

    streams: Streams

    def __init__(
        self,
        source: Checkpoint,
        plan: GgufPlan,
        calibration: Calibration,
        device: torch.device | str,
        folder: Path,
        reference: SharedReference | None = None,
        others: int = 0,
    ) -> None:
        """others: bytes that the streams of other runs will take.

        FitError when a layer needs more memory than is free; nothing is allocated before `begin`.
        """
        self.source, self.plan, self.calibration, self.device, self.folder = source, plan, calibration, device, folder
        self.method, self.dtype, self.report = METHODS[calibration.effort], default_dtype(device), Report()
        windows, length = calibration.tokens.shape
        self.windows, self.own = windows, rank_share(windows, *world())
        most = max(map(len, rank_shares(windows)))
        # One plan for all ranks: what is free differs, the pieces that are divided must not.
        self.memory = from_owner(lambda: plan_memory(source.geometry, most, length, device, others))
        shape = (windows, length, source.geometry.hidden)
        self.reference = reference or SharedReference(shape, self.memory.place, folder)
        self.user, self._saver = self.reference.join(), Saver()

    def begin(self, step: int) -> None:
        """Both streams as they enter `step`. InputError when their files are damaged or gone."""
        memory = self.memory
        quantized = HiddenStates(*self.reference.shape, folder=self.folder, device=memory.place)
        self.streams = Streams(quantized, quantized, memory.batch, self.device, memory.moments)
        self.reference.begin(self.user, step, len(self.plan.steps) - 1)
        if 0 < step < len(self.plan.steps):
            take_part(self.folder, self._stem(step), {"written": quantized}, self.own, self.windows)

    def tensors(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """(name, bytes) of the tensors of one step, in order."""
        self.streams = replace(self.streams, reference=self.reference.enter(step))
        data = self._values(step)
        for tensor in self.plan.steps[step] if world()[0] == 0 else ():  # the rank that writes
            yield tensor.name, data.pop(tensor.name)

    def save(self, step: int) -> None:
        """Both streams as they enter `step`; behind the head nothing is left to keep."""
        if step < len(self.plan.steps):
            self.reference.save(step)
            states = {"written": self.streams.quantized}
            self._saver.save(self.folder, self._stem(step), states, self.own, self.windows)

    def settle(self) -> None:
        """Wait until both are durable."""
        self.reference.settle()
        self._saver.settle()

    def stop(self) -> None:
        """Save nothing more."""
        self.reference.stop()
        self._saver.stop()

    def forget(self, step: int) -> None:
        """Delete the streams that entered `step`."""
        drop_parts(self.folder, "written", step + 1)
        self.reference.forget(self.user, step, len(self.plan.steps) - 1)

    def _stem(self, step: int) -> str:
        return f".hidden-{step:03d}-written"

    def _values(self, step: int) -> dict[str, np.ndarray]:
        g, types, layer = self.source.geometry, self.plan.types, self.plan.layer(step)
        if step == 0:
            return {TOKEN_EMBD: self._embed()}
        if layer is not None:
            weights = read_layer_shared(self.source, layer, self.device, self.dtype)
            with naming(f"layer {layer}"):
                made = quantize_layer(self.streams, weights, layer, types, g, self.method, self.report)
            self._check_streams(layer)
            return made
        norm = from_owner(lambda: self.source.read(g.names.final_norm)).to(self.device)
        pair = head_pair(self.streams, norm, g)
        if world()[0] != 0:
            return {}
        head = quantize_head(pair, self.source.read(g.names.head).to(self.device), types, self.method)
        return {OUTPUT_NORM: norm.float().cpu().numpy(), OUTPUT: head}

    def _check_streams(self, layer: int) -> None:
        """InputError where the model, or what was made of it, left finite numbers."""
        for label, hidden in ((self.source.label, self.streams.reference), (self.plan.label, self.streams.quantized)):
            for start, values in hidden.batches(self.streams.batch, self.streams.device):
                check_activations(values, leaving(label, layer), self.own.start + start)

    def _embed(self) -> np.ndarray:
        """The embeddings' bytes; both streams begin."""
        info = self.plan.steps[0][0]
        stored = from_owner(lambda: encode_nearest(Matrices(self.source, info), self.device))
        mine = self.calibration.tokens[self.own.start : self.own.stop]
        for start, exact in embedded(self.source, mine, self.streams.batch):
            tokens = mine[start : start + self.streams.batch]
            rows = torch.from_numpy(stored[tokens.flatten().numpy()])
            self.streams.put(start, exact, decode(rows, GGMLType[info.type], info.shape[-1]).view(*tokens.shape, -1))
        return stored
