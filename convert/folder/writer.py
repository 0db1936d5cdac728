"""Write a safetensors folder step by step, with sizes known first, so that a killed run continues.

A step is what one layer (or what stands outside the layers) contributes. Shards are filled in that order up to a size
limit; a shard grows under a temporary name and is renamed when whole. A progress file says how many steps are durable;
it goes when the manifest is written, so a folder with a manifest is whole.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError
from mmquant.stages import stage

from ..checkpoints.checkpoint import TORCH_DTYPES
from ..checkpoints.finite import check_finite
from ..checkpoints.store import INDEX
from ..files.atomic import write_whole
from ..files.growing import GrowingFiles
from ..files.progress import Progress
from ..formats.spec import TensorSpec

SHARD_LIMIT = 5_000_000_000
ALIGNMENT = 8
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file of the plan: its tensors in order and the header that describes them."""

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(t.bytes for t in self.tensors)


def plan_shards(steps: Iterable[Iterable[TensorSpec]], limit: int = SHARD_LIMIT, framework: str = "pt") -> list[Shard]:
    """Fill shards with the steps' tensors in order; each holds at most `limit` bytes of data (or one larger tensor).

    framework: what the headers say of whom they are for.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in (spec for step in steps for spec in step):
        if groups[-1] and size + spec.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.bytes
    count = len(groups)
    return [
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group), _header(group, framework))
        for i, group in enumerate(groups, 1)
    ]


def _header(tensors: list[TensorSpec], framework: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": framework}}
    position = 0
    for spec in tensors:
        end = position + spec.bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, without a copy when it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


class FolderWriter(GrowingFiles):
    """Writes the planned tensors step by step, on a thread of its own: `done` steps are handed in.

    A run that continues finds those that are durable done. At most one step waits while the next one is made.
    """

    def __init__(
        self,
        folder: Path,
        steps: list[list[TensorSpec]],
        run: Mapping[str, Any],
        limit: int = SHARD_LIMIT,
        away: Collection[str] = (),
        framework: str = "pt",
        check: Callable[[int], object] | None = None,
    ) -> None:
        """away: shards that were published and deleted; a run that continues does not look for them.

        check: is told the bytes of all shards before anything is written, and may raise.
        """
        self.away, self.shards = away, plan_shards(steps, limit, framework)
        self._step_ends = _cumulative(steps)
        self._shard, self._tensor = 0, 0
        plan = hashlib.sha256(b"".join(shard.name.encode() + shard.header for shard in self.shards)).hexdigest()
        if check is not None:
            check(self.bytes)
        super().__init__(folder, Progress(folder, run, plan, len(steps)))
        self._resume()

    @property
    def bytes(self) -> int:
        """Bytes of all shards when finished."""
        return sum(shard.bytes for shard in self.shards)

    def whole(self) -> dict[str, int]:
        """Shards that are whole, with durable digests, and the step that filled each; waits for what was handed in."""
        self.settle()
        self.progress.checked()
        self.progress.save()
        shards = self.shards[: self._shard]
        ends = accumulate(len(shard.tensors) for shard in shards)
        return {shard.name: bisect_left(self._step_ends, end) for shard, end in zip(shards, ends, strict=True)}

    def write(self, step: int, tensors: Mapping[str, Tensor], check: Callable[[], object] | None = None) -> None:
        """Hand in one step's tensors, as planned; `settle` says when they are durable.

        check: reads what was written, before the step counts as done. The next call raises what failed, and the
        folder stays unfinished: InputError names a tensor with NaN or infinity.
        """
        assert step == self.done, (step, self.done)
        self.settle()
        expected = self._step_ends[step] - (self._step_ends[step - 1] if step else 0)
        assert len(tensors) == expected, (len(tensors), expected)
        for spec in self._planned(self._step_ends[step] - expected, self._step_ends[step]):
            tensor = tensors[spec.name]
            found = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            assert found == (spec.dtype, spec.shape), (spec, found)
            self._behind.put(partial(self._append, step, spec, tensor.detach().cpu()), spec.bytes)
        self._behind.put(partial(self._end_step, step, check))
        self.done = step + 1

    def finish(self, files: Mapping[str, bytes]) -> list[str]:
        """Write the index and the small files; returns all names, shards first. The caller writes the manifest last."""
        assert self.done == len(self._step_ends)
        self.settle()
        assert self._file is None
        self.progress.checked()
        everything = {**files, INDEX: self.index()}
        for name, data in everything.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_whole(self.folder / name, data)
            self.sha256[name] = hashlib.sha256(data).hexdigest()
        return [shard.name for shard in self.shards] + list(everything)

    def index(self) -> bytes:
        """The index of the shards."""
        table = {spec.name: shard.name for shard in self.shards for spec in shard.tensors}
        total = sum(spec.bytes for shard in self.shards for spec in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        return (json.dumps(index, indent=1) + "\n").encode()

    # -- on the writing thread -------------------------------------------------------------------------------------

    def _append(self, step: int, spec: TensorSpec, tensor: Tensor) -> None:
        shard = self.shards[self._shard]
        assert shard.tensors[self._tensor] == spec
        with self._naming(step):
            check_finite(tensor, f"{self.folder}: {spec.name}")
            if self._file is None:
                self._begin(shard.name, shard.header)
            self._put(tensor_bytes(tensor))
            self._tensor += 1
            if self._tensor == len(shard.tensors):
                self._end(shard.name)
                self._shard, self._tensor = self._shard + 1, 0

    def _end_step(self, step: int, check: Callable[[], object] | None) -> None:
        with self._naming(step):
            if self._file is not None:
                self._file.flush()
            if check is not None:
                with stage("check"):
                    check()
            self._sync()
        self.progress.done = step + 1
        self.progress.save()

    @contextmanager
    def _naming(self, step: int) -> Generator[None]:
        """What the disk refuses names the step; the open shard is left."""
        try:
            yield
        except InputError:
            self._leave()
            raise
        except OSError as error:
            self._leave()
            where = error.filename if error.filename is not None else str(self.folder)
            raise OSError(error.errno, f"{error.strerror} while writing step {step}", where) from None

    def _planned(self, first: int, last: int) -> Iterator[TensorSpec]:
        """Tensors first..last-1 of all shards."""
        at = 0
        for shard in self.shards:
            yield from shard.tensors[max(0, first - at) : max(0, last - at)]
            at += len(shard.tensors)

    def _resume(self) -> None:
        """Take up an unfinished run behind its last whole step."""
        tensors = self._step_ends[self.done - 1] if self.done else 0
        for shard in self.shards:
            if tensors < len(shard.tensors):
                break
            tensors -= len(shard.tensors)
            self._shard += 1
        self.progress.check({s.name: s.bytes for s in self.shards[: self._shard] if s.name not in self.away})
        self._tensor = tensors
        if tensors:
            shard = self.shards[self._shard]
            length = len(shard.header) + sum(t.bytes for t in shard.tensors[:tensors])
            self._go_on(shard.name, length)


def _cumulative(steps: list[list[TensorSpec]]) -> list[int]:
    ends: list[int] = []
    total = 0
    for step in steps:
        total += len(step)
        ends.append(total)
    return ends
