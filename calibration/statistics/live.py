"""The two statistics providers: a live pass that stores nothing, and stored statistics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmquant.errors import FitError, InputError
from mmquant.tables import gib

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.models.layer import LayerWeights
from ..model.distributed import barrier, rank_share, world
from ..model.hidden import RAM_LIMIT, place_of
from ..model.reading import read_layer_shared
from ..model.stream import DISK_LIMIT, Stream, Streaming
from ..text.corpus import Corpus
from .collect import Collect
from .held import HELD
from .layer_pass import MomentPlan, calibrate_layer, free_memory, layer_bytes, plan_moments, sum_over_ranks
from .provider import LayerInputs
from .store import StoredStatistics

PROPAGATE = ("reference", "quantized")


@dataclass(frozen=True)
class PassOptions:
    """How a pass is computed. None: chosen from the device (`memory`: bytes for accumulators; `batch`: windows).

    hold: keep some rows of full sums out of them, by which a rounding is judged (Moments.held)
    """

    collect: Collect = field(default_factory=Collect)
    propagate: str = "reference"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    memory: int | None = None
    batch: int | None = None
    ram_limit: int = RAM_LIMIT
    disk_limit: int = DISK_LIMIT
    hold: bool = False

    def __post_init__(self) -> None:
        if self.propagate not in PROPAGATE:
            raise InputError(f"propagate {self.propagate!r}, expected reference or quantized")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU; never float16."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def moment_plan(source: Checkpoint, options: PassOptions, tokens: int) -> MomentPlan:
    """Accumulators within the stated memory limit, or within what is free beside one layer's weights and the stream."""
    cpu = torch.device(options.device).type == "cpu"
    room = None if cpu else int(free_memory("cpu") * 0.6)
    memory = options.memory
    if memory is None:
        hidden = 4 * tokens * source.geometry.hidden
        hidden = hidden if place_of(options.device, hidden).type != "cpu" else 0
        free, weights = free_memory(options.device), 2 * layer_bytes(source.geometry, options.dtype)
        try:
            return plan_moments(source.geometry, options.collect, max(int((free - hidden) * 0.8) - weights, 0), room)
        except FitError as error:
            taken = f"{options.device} has {gib(free)} of memory free, a layer takes {gib(weights)}"
            raise FitError(f"{taken}: {error}") from None
    return plan_moments(source.geometry, options.collect, memory, room)


class LivePass(Streaming):
    """Runs the forward layer by layer and hands each layer's statistics over, storing nothing.

    `folder` keeps the hidden states between layers, so that a killed run continues with the same bits; without it a
    run that starts at a later layer replays the layers before (reference propagation only).
    """

    def __init__(
        self,
        source: Checkpoint,
        corpus: Corpus,
        options: PassOptions | None = None,
        *,
        hidden: bool = False,
        folder: Path | None = None,
    ) -> None:
        """hidden: hand over the entering residual stream as well (costs a second forward of every layer)."""
        self.options = options if options is not None else PassOptions()
        self.source, self.corpus, self.folder = source, corpus, folder
        self.late = hidden or self.options.propagate == "quantized"
        self.show_hidden = hidden
        o, windows = self.options, len(corpus.tokens)
        # Learned rounding works on the tokens of all windows: every rank has them all then.
        self.own = range(windows) if hidden else rank_share(windows, *world())
        self.plan = moment_plan(source, o, len(self.own) * corpus.tokens.shape[1])
        self._pending: LayerWeights | None = None
        self._kept: dict[str, Any] = {}

    def make_stream(self) -> Stream:
        """As it enters the first layer."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        o = self.options
        return Stream(
            self.source,
            self.corpus.tokens,
            own=self.own,
            device=o.device,
            dtype=o.dtype,
            batch=o.batch,
            folder=self.folder,
            ram_limit=o.ram_limit,
            disk_limit=o.disk_limit,
        )

    def run(self) -> dict[str, Any]:
        """What identifies the statistics."""
        settings: dict[str, Any] = {"propagate": self.options.propagate}
        settings["dtype"] = str(self.options.dtype).removeprefix("torch.")
        if self.options.hold:
            settings["held_rows"] = HELD
        return {
            "calibration": {"corpus": self.corpus.describe(), **dataclasses.asdict(self.options.collect), **settings}
        }

    def layer(self, layer: int) -> LayerInputs:
        """The layer's weights and statistics; earlier layers that were not asked for are passed through."""
        self._enter(layer)
        weights = self.stream.read_layer(layer)
        domains = len(self.corpus.domains)
        found = calibrate_layer(
            self.stream,
            weights,
            self.corpus.domain[self.own.start : self.own.stop],
            domains,
            self.options.collect,
            self.plan,
            first_window=self.own.start,
            advance=not self.late,
            scratch=self.folder,
            hold=self.options.hold,
        )
        if not self.show_hidden:
            found = sum_over_ranks(found)
        self._pending = weights if self.late else None
        hidden = self.stream.hidden if self.show_hidden else None
        return LayerInputs(layer, weights, found, hidden, self.options.propagate == "quantized", self._kept)

    def quantized(self, layer: int, weights: LayerWeights) -> None:
        """Let the next layer see this layer's quantized output (only with propagate quantized)."""
        if self.options.propagate == "quantized" and layer == self.stream.layer:
            self._pending = weights
            self._leave()

    def _enter(self, layer: int) -> None:
        if self.stream.layer < 0:
            self.stream.start(layer, replay=self.options.propagate == "reference")
            self._checkpoint()
        self._leave()
        while self.stream.layer < layer:
            self.stream.advance(self.stream.read_layer(self.stream.layer))
        if self.stream.layer != layer:
            raise InputError(
                f"layer {layer} asked for after layer {self.stream.layer - 1}: a live pass goes forward only"
            )

    def _leave(self) -> None:
        """Leave the layer whose statistics were handed over, with the weights that the next layer shall see."""
        if self._pending is not None:
            self.stream.advance(self._pending)
            self._pending = None
        self._checkpoint()

    def _checkpoint(self) -> None:
        if self.folder is not None:
            self.stream.save()
            barrier()  # before the layer counts, and before any rank's older state goes
            # What is written may be a step behind, and so is where a killed run goes on.
            self.stream.keep_from(self.stream.layer - (2 if self.options.propagate == "quantized" else 1))


class SharedPass:
    """A provider that several variants ask for the same layer: computed once, dropped by `release`.

    Only for passes of the reference: what `quantized` hands back would be one variant's.
    """

    def __init__(self, inner: LivePass | StoredPass) -> None:
        self.inner = inner
        self._inputs: LayerInputs | None = None

    def run(self) -> dict[str, Any]:
        """What identifies the statistics."""
        return self.inner.run()

    def layer(self, layer: int) -> LayerInputs:
        """The layer's weights and statistics."""
        if self._inputs is None or self._inputs.layer != layer:
            self._inputs = None
            self._inputs = self.inner.layer(layer)
        return self._inputs

    def quantized(self, layer: int, weights: LayerWeights) -> None:
        """The next layer sees the reference; nothing to do."""

    def settle(self) -> None:
        """Wait until the saved stream is durable."""
        self.inner.settle()

    def stop(self) -> None:
        """Save nothing more."""
        self.inner.stop()

    def release(self) -> None:
        """Nobody asks for the layer any more."""
        self._inputs = None


class StoredPass:
    """Stored statistics as a provider; weights are read from the checkpoint."""

    def __init__(self, source: Checkpoint, stored: StoredStatistics, options: PassOptions | None = None) -> None:
        """Raises ValueError when the statistics are of another checkpoint or unfinished."""
        stored.check(source.fingerprint, source.geometry.layers)
        self.source, self.stored = source, stored
        self.options = options if options is not None else PassOptions()

    def run(self) -> dict[str, Any]:
        """What identifies the statistics."""
        identity = self.stored.identity
        return {"calibration": {"corpus": identity["corpus"], **identity["collect"], "propagate": "reference"}}

    def layer(self, layer: int) -> LayerInputs:
        """The layer's weights and stored statistics."""
        weights = read_layer_shared(self.source, layer, self.options.device, self.options.dtype)
        return LayerInputs(layer, weights, self.stored.layer(layer), None)

    def quantized(self, layer: int, weights: LayerWeights) -> None:
        """Stored statistics are of the reference; nothing to do."""

    def settle(self) -> None:
        """There is no stream."""

    def stop(self) -> None:
        """There is no stream."""
