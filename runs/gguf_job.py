"""Write a GGUF file (or its parts) in one pass over a checkpoint: headers, layer by layer, manifest last."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mmquant.errors import InputError
from mmquant.monitor import counted, current

from ..calibration.gguf.provider import TensorProvider
from ..calibration.gguf.run import CalibratedRun, Calibration
from ..calibration.gguf.run_fast import FastRun
from ..calibration.gguf.run_nearest import NearestRun
from ..calibration.gguf.run_stored import Stored, StoredRun
from ..calibration.model.distributed import barrier, world
from ..calibration.model.divided import from_owner
from ..calibration.model.stream import forget
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import write_whole
from ..convert.files.progress import damaged
from ..convert.gguf.doctor import check_metadata
from ..convert.gguf.growing import growing_file
from ..convert.gguf.plan import GgufPlan, make_plan
from ..convert.gguf.reader import GgufSource
from ..convert.gguf.variant import GgufVariant
from ..convert.gguf.writer import GgufWriter
from ..convert.hub.ledger import sent
from ..convert.manifest import FileEntry
from ..convert.source import CARRIED_FILES
from .engine import Shared, run_jobs
from .made import finish_folder
from .passes import Passes
from .place import check_disk, claim, is_finished, written_bytes

if TYPE_CHECKING:
    from ..convert.source import Source


class GgufJob:
    """A GGUF file, or its parts, written in one pass. See `write_gguf`."""

    def __init__(
        self,
        source: Checkpoint,
        variant: GgufVariant,
        out: Path,
        *,
        calibration: Calibration | Stored | None = None,
        device: torch.device | str = "cpu",
        passes: Passes | None = None,
    ) -> None:
        """passes: what is shared with other artifacts of the run."""
        source.validate()
        self.source, self.out, self.label = source, out, variant.label
        self.made: tuple[str, ...] = ()  # what was typed, for the manifest
        importance = calibration.importance(source.geometry) if calibration else None
        self.plan = make_plan(source, variant, importance)
        self.run = run_of(source, variant) | (calibration.run() if calibration else {})
        self.path, self.steps = out / self.plan.parts[0].name, len(self.plan.steps)
        self.first = world()[0] == 0  # the rank that writes
        self.finished, self.done = from_owner(lambda: is_finished(out, self.run)), 0
        self.uses: list[Shared] = []
        self.provider: TensorProvider | None = None
        self._writer: GgufWriter | None = None
        self.room: int | None = None  # bytes that the disk holds at once, where whole parts leave it early
        if not self.finished:
            self.provider = provider_of(source, self.plan, calibration, device, out, passes)
            self.uses = [self.provider.passes] if isinstance(self.provider, FastRun) else []

    @property
    def writer(self) -> GgufWriter:
        """The writer, inside `open`."""
        assert self._writer is not None
        return self._writer

    @property
    def bytes(self) -> int:
        """Of all files."""
        return self.plan.bytes

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder, and take up what an unfinished run left."""
        assert self.provider is not None
        if not self.first:
            self.done = from_owner(lambda: 0)  # what the first rank says
            self.provider.begin(self.done)
            barrier()
            yield
            return
        with claim(self.out, self.run):
            needed = self.plan.bytes if self.room is None else self.room
            check_disk(self.out, max(0, needed - written_bytes(self.out)), self.source)
            self._writer = writer = GgufWriter(self.out, self.plan.parts, self.run, sent(self.out))
            first = self.plan.first_step(writer.done)
            if first is None:
                raise damaged(writer.progress.path, f"{writer.done} tensors are done", "whole steps")
            self.done = from_owner(lambda: first)
            self.provider.begin(first)
            barrier()  # every rank has read what the first may delete
            try:
                yield
            finally:
                writer.close()
                self.provider.stop()

    def step(self, step: int) -> None:
        """Make the tensors of one step; they are written behind it."""
        assert self.provider is not None
        if self.first:
            write_step(self.writer, self.provider, step)
        elif not isinstance(self.provider, NearestRun):
            help_step(self.provider, step)
        self.done = step + 1

    def settle(self) -> None:
        """Wait until what was made is durable."""
        if self.first:
            self.writer.settle()

    def growing(self) -> Source:
        """The model as far as it is written, to be read."""
        return GgufSource(self.path, [growing_file(self.out, part) for part in self.plan.parts])

    @property
    def quant_label(self) -> str:
        """What its files' names end with."""
        return self.plan.label

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every part when it is whole."""
        return {part.name: part.bytes for part in self.plan.parts}

    def whole(self) -> dict[str, int]:
        """Parts that may leave, and the step that filled each; inside `open`."""
        ends = list(accumulate(map(len, self.plan.steps)))
        return {name: bisect_left(ends, tensors) for name, tensors in self.writer.whole().items()}

    def sha256(self, name: str) -> str:
        """Of a whole part."""
        return self.writer.sha256[name]

    def check(self, layers: Sequence[int]) -> None:
        """Nothing: the writer has seen every scale."""
        del layers

    def small_files(self) -> dict[str, bytes]:
        """What lies beside the parts."""
        return licences(self.source)

    def finish(self) -> Path:
        """The licence beside the file, the check, the manifest."""
        if not self.first:
            forget(self.out)
            return self.path
        source, out, plan = self.source, self.out, self.plan
        paths, sizes = self.writer.finish(), self.sizes
        if self.provider is not None:
            self.provider.settle()
        entries = [FileEntry(p.name, sizes[p.name], self.writer.sha256[p.name]) for p in paths]
        entries += carry_licence(source, out)
        away = sent(out) & sizes.keys()
        check_file(cast("GgufSource", self.growing()) if away else GgufSource(self.path))
        weights, entry = plan.weights(), self.path.name
        finish_folder(out, source, "gguf", plan.label, tuple(entries), weights, self.run, entry=entry, made=self.made)
        forget(out)
        self.writer.clear_progress()
        return self.path


def write_gguf(
    source: Checkpoint,
    variant: GgufVariant,
    out: Path,
    *,
    calibration: Calibration | Stored | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write `variant` of `source` into the folder `out`; returns the file to give to llama.cpp (the first part).

    With `calibration` its text or its stored statistics steer the codes; without, every weight goes to the nearest
    point.

    A finished folder of the same run is left alone, an unfinished one continued at its layer. InputError when `out`
    holds something else, FitError when the disk is too small.
    """
    job = GgufJob(source, variant, out, calibration=calibration, device=device)
    run_jobs([job])
    return job.path


def run_of(source: Checkpoint, variant: GgufVariant) -> dict[str, Any]:
    """Everything that decides the bytes, apart from the calibration."""
    return {**variant.run(), "source": source.fingerprint, "part_bytes": variant.part_bytes}


def provider_of(
    source: Checkpoint,
    plan: GgufPlan,
    calibration: Calibration | Stored | None,
    device: torch.device | str,
    out: Path,
    passes: Passes | None = None,
) -> TensorProvider:
    """What makes the tensors of `plan`. FitError, before anything is written, when a layer needs too much memory."""
    if calibration is None:
        return NearestRun(source, plan, device)
    if isinstance(calibration, Stored):
        return StoredRun(source, plan, calibration, device)
    shared, tokens = passes or Passes(source, str(device)), calibration.tokens
    if calibration.effort == "fast":
        return FastRun(source, plan, tokens, device, out, shared.fast_pass(tokens, out))
    return CalibratedRun(source, plan, calibration, device, out, shared.reference(tokens, out), shared.others)


def write_step(writer: GgufWriter, provider: TensorProvider, step: int) -> None:
    """Hand one step to the writer, to be made durable, and say what was done beyond rounding."""
    for name, data in provider.tensors(step):
        writer.write(name, data)
    provider.save(step + 1)
    if world()[1] == 1:
        writer.commit(provider.settle, partial(provider.forget, step))
    else:
        helped = not isinstance(provider, NearestRun)
        if helped:
            barrier()  # all ranks have kept what the next step needs
        writer.checkpoint()
        if helped:
            barrier()
        provider.forget(step)
    for line in provider.report.of_layer(step - 1):
        current().message(line)
    for kind, count in provider.report.counts(step - 1).items():
        counted(kind, count)


def help_step(provider: TensorProvider, step: int) -> None:
    """What ranks do that do not write, in the order of `write_step`."""
    for _ in provider.tensors(step):
        pass
    provider.save(step + 1)
    barrier()
    barrier()  # the first rank has what it wrote on disk
    provider.forget(step)


def check_file(found: GgufSource) -> None:
    """InputError unless the set is whole and its metadata makes runtimes work; the writer has seen every scale."""
    found.validate()
    for finding in check_metadata(found):
        if finding.level == "error":
            raise InputError(f"{found.label}: {finding.where} is {finding.text}")


def licences(source: Checkpoint) -> dict[str, bytes]:
    """Licence and notice files, byte for byte (everything else that engines need is in the GGUF)."""
    names = [name for name in CARRIED_FILES if name.startswith(("LICENSE", "NOTICE"))]
    found = {name: source.small_file(name) for name in names}
    return {name: data for name, data in found.items() if data is not None}


def carry_licence(source: Checkpoint, out: Path) -> list[FileEntry]:
    """The same, written beside the model."""
    entries = []
    for name, data in licences(source).items():
        write_whole(out / name, data)
        entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return entries
