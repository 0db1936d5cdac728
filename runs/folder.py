"""Write a folder in one pass over a checkpoint: validate, plan, layer by layer, manifest last; resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.model.distributed import world
from ..calibration.model.divided import from_owner
from ..calibration.statistics.live import SharedPass
from ..convert.carried import carried_files
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.checkpoints.growing import GrowingFolder
from ..convert.checkpoints.quantized_folder import QuantizedFolder
from ..convert.checkpoints.store import INDEX, LocalFolder
from ..convert.folder.bf16 import check_bf16_layer, compare_bf16
from ..convert.folder.check import check_headers, check_outside, check_written_layer, compare_layer
from ..convert.folder.variant import FolderVariant, StoresOutside, quantized_config
from ..convert.folder.writer import SHARD_LIMIT, FolderWriter, Shard, plan_shards
from ..convert.formats.table import METHODS
from ..convert.hub.ledger import sent
from ..convert.manifest import FileEntry
from ..convert.models.shapes import global_shapes
from ..convert.open import open_store
from .engine import run_jobs
from .folder_steps import prepare, step_tensors
from .made import finish_folder
from .place import check_disk, claim, is_finished, written_bytes

if TYPE_CHECKING:
    from ..calibration.statistics.provider import Provider
    from ..convert.source import Source


SAMPLES = 4  # experts of each layer that are compared with the original
EXPERTS_KEPT = "experts_kept.json"  # of a pruned model: the original's numbers of each layer's experts


class FolderJob:
    """A folder that is written in one pass. See `write_folder`."""

    def __init__(
        self,
        source: Checkpoint,
        variant: FolderVariant,
        out: Path,
        *,
        device: torch.device | str = "cpu",
        limit: int = SHARD_LIMIT,
        provider: Provider | None = None,
        behind: int = 0,
        streams: Path | None = None,
    ) -> None:
        """streams: a folder that goes when the artifact is finished; the rest as of `write_folder`."""
        self.source, self.variant, self.out, self.path = source, variant, out, out
        self.device, self.limit, self.provider, self.behind, self.streams = device, limit, provider, behind, streams
        self.label, self.prepared = variant.label, prepare(source, variant)
        carried_files(source)  # what cannot be carried is refused before anything is written
        self.made: tuple[str, ...] = ()  # what was typed, for the manifest
        self.run = {**variant.run(), "source": source.fingerprint, "shard_limit": limit}
        if source.kept is not None:
            self.run["experts"] = len(source.kept[0])
        if provider is not None:
            self.run |= provider.run()
        self.first = world()[0] == 0  # the rank that writes
        self.finished = from_owner(lambda: is_finished(out, self.run))
        self.uses = [provider] if isinstance(provider, SharedPass) else []
        self.steps = len(self.prepared.steps)
        self._writer: FolderWriter | None = None
        self._done = 0  # of the first rank, on the others
        self.room: int | None = None  # bytes that the disk holds at once, where whole shards leave it early

    @property
    def writer(self) -> FolderWriter:
        """The writer, inside `open`."""
        assert self._writer is not None
        return self._writer

    @property
    def done(self) -> int:
        """Steps that are durable."""
        return self.writer.done if self.first else self._done

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return self.prepared.bytes

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder; the plan of an unfinished run is compared, and its files are. Other ranks hear of it."""
        if not self.first:
            self._done = from_owner(lambda: 0)  # what the first rank says
            with self.source.schedule.kept(self.behind):
                yield
            return
        with claim(self.out, self.run):
            framework = framework_of(self.variant.quantization_config(self.source))
            self._writer = FolderWriter(
                self.out, self.prepared.steps, self.run, self.limit, sent(self.out), framework, self._check_disk
            )
            from_owner(lambda: self.writer.done)
            try:
                with self.source.schedule.kept(self.behind):
                    yield
            finally:
                self.writer.close()
                if self.provider is not None:
                    self.provider.stop()

    def _check_disk(self, size: int) -> None:
        """FitError unless the disk holds `size` bytes, or those of them that it must hold at once."""
        needed = size if self.room is None else self.room
        check_disk(self.out, max(0, needed - written_bytes(self.out)), self.source)

    def step(self, step: int) -> None:
        """Make the tensors of one step; they are written and checked behind it. Other ranks help to solve."""
        if self.first:
            tensors = step_tensors(self.source, self.variant, step, self.device, self.provider)
            self.writer.write(step, tensors, partial(self._end_step, step))
            if world()[1] > 1:
                self.settle()
            return
        if self.provider is not None and 1 <= step <= self.source.geometry.layers:
            step_tensors(self.source, self.variant, step, self.device, self.provider)
        self._done = step + 1

    def settle(self) -> None:
        """Wait until what was made is durable."""
        if self.first:
            self.writer.settle()

    def _end_step(self, step: int) -> None:
        """Before a written step counts: its values are read as an engine will, its streams are durable."""
        on_cuda, layers = torch.device(self.device).type == "cuda", self.source.geometry.layers
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if on_cuda else nullcontext():
            if 1 <= step <= layers:
                self._check([step - 1], step == 1, None)
            elif isinstance(self.variant, StoresOutside) and isinstance(found := self._read_back, QuantizedFolder):
                embed = found.names.embed
                check_outside(found, [n for n in global_shapes(found.geometry) if (n == embed) == (step == 0)])
        if self.provider is not None:
            self.provider.settle()

    def finish(self) -> Path:
        """Index and small files, the check as an engine reads, the manifest."""
        if not self.first:
            if self.streams is not None:  # on this rank's own disk, perhaps
                shutil.rmtree(self.streams, ignore_errors=True)
            return self.out
        source, variant, out = self.source, self.variant, self.out
        names, sizes = self.writer.finish(self.small_files()), self.sizes
        if self.away:
            self.check(range(source.geometry.layers), headers=True)
        else:
            check_written(out, source, variant.quantization_config(source) is not None)
        if self.provider is not None:
            self.provider.settle()
        sizes |= {name: (out / name).stat().st_size for name in names if name not in sizes}
        entries = tuple(FileEntry(n, sizes[n], self.writer.sha256[n]) for n in names)
        weights = self.prepared.weights
        finish_folder(out, source, variant.format, variant.label, entries, weights, self.run, made=self.made)
        self.writer.clear_progress()
        if self.streams is not None:
            shutil.rmtree(self.streams, ignore_errors=True)
        return out

    def growing(self) -> Source:
        """The artifact as far as it is written, to be read; inside `open`."""
        return open_store(self._growing())

    def _growing(self) -> GrowingFolder:
        headers = {shard.name: (shard.header, shard.bytes) for shard in self._shards}
        return GrowingFolder(self.out, headers, {**self.small_files(), INDEX: self.writer.index()})

    @cached_property
    def _shards(self) -> list[Shard]:
        framework = framework_of(self.variant.quantization_config(self.source))
        return plan_shards(self.prepared.steps, self.limit, framework)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every shard when it is whole."""
        return {shard.name: shard.bytes for shard in self._shards}

    @property
    def quant_label(self) -> str:
        """What it is called, whatever a run calls it."""
        return self.variant.label

    @property
    def away(self) -> set[str]:
        """Shards that are on a hub and no longer here."""
        return sent(self.out) & self.sizes.keys()

    def whole(self) -> dict[str, int]:
        """Shards that may leave, and the step that filled each; inside `open`."""
        return self.writer.whole()

    def sha256(self, name: str) -> str:
        """Of a whole shard."""
        return self.writer.sha256[name]

    def check(self, layers: Sequence[int], headers: bool = False) -> None:
        """Read layers of the growing artifact back as an engine does; what lies in shards that are gone was checked."""
        away = self.away
        gone = {tensor.name for shard in self._shards if shard.name in away for tensor in shard.tensors}
        here = [n for n in layers if gone.isdisjoint(spec.name for spec in self.prepared.steps[n + 1])]
        self._check(here, headers, self.source if self.source.store.is_local else None)

    def _check(self, here: Sequence[int], headers: bool, original: Checkpoint | None) -> None:
        found = self._read_back
        if isinstance(found, Checkpoint):
            if headers:
                found.validate(scales=False)
            for layer in here:
                check_bf16_layer(found, layer, original, SAMPLES)
            return
        if headers:
            check_headers(found)
        for layer in here:
            check_written_layer(found, layer, original, SAMPLES, self.device)

    @cached_property
    def _read_back(self) -> Checkpoint | QuantizedFolder:
        """As `check_written` reads it."""
        quantized = self.variant.quantization_config(self.source) is not None
        return QuantizedFolder(self._growing()) if quantized else Checkpoint(self._growing())

    def small_files(self) -> dict[str, bytes]:
        """config.json and what is carried beside it."""
        quantization = self.variant.quantization_config(self.source)
        made = {**further_files(quantization), "config.json": quantized_config(self.source, quantization)}
        if self.source.kept is not None:
            made[EXPERTS_KEPT] = {"experts_kept": self.source.kept}
        files = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in made.items()}
        return {**carried_files(self.source), **files}


def write_folder(
    source: Checkpoint,
    variant: FolderVariant,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    limit: int = SHARD_LIMIT,
    provider: Provider | None = None,
    behind: int = 0,
    made: tuple[str, ...] = (),
) -> Path:
    """Write `variant` of `source` into the folder `out` and return it. A finished folder of the same run is left alone.

    `provider` hands a calibrated variant its statistics; None for one that needs none. `behind`: how many layers before
    the one at work are read once more. The folder is read again as an engine would before it gets its manifest: one
    that fails stays unfinished. `made`: the words of the command that was typed.

    Raises InputError when `out` holds something else or fails its check, FitError when disk or memory is too small.
    """
    job = FolderJob(source, variant, out, device=device, limit=limit, provider=provider, behind=behind)
    job.made = made
    run_jobs([job])
    return out


def further_files(quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """Objects of JSON files beside config.json that engines of the quant_method look for, by name."""
    if quantization is None:
        return {}
    method = METHODS[str(quantization["quant_method"])]
    return {} if method.files is None else method.files(dict(quantization))


def framework_of(quantization: Mapping[str, Any] | None) -> str:
    """What the shards' headers say of whom they are for."""
    return "pt" if quantization is None else METHODS[str(quantization["quant_method"])].framework


def check_written(out: Path, source: Checkpoint, quantized: bool = True) -> None:
    """InputError unless an engine finds in the folder what was meant; its values were read when they were written.

    A hub's shards were verified on their way and are gone: fetching them again to compare would double the traffic.
    """
    original, store = source if source.store.is_local else None, LocalFolder(out)
    found = QuantizedFolder(store) if quantized else Checkpoint(store)
    if isinstance(found, QuantizedFolder):
        check_headers(found)
    else:
        found.validate()
    for layer in range(source.geometry.layers if original is not None else 0):
        assert original is not None
        if isinstance(found, QuantizedFolder):
            compare_layer(found, original, SAMPLES, layer)
        else:
            compare_bf16(found, original, SAMPLES, layer)
