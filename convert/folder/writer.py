"""A safetensors folder written step by step: sizes are known first, so a killed run continues where it stopped.

A step is what one layer (or what stands outside the layers) contributes. Shards are filled in that order up to a size
limit; a shard grows under a temporary name and is renamed when whole. A progress file says how many steps are durable;
it goes when the manifest is written, so a folder with a manifest is whole.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.checkpoint import TORCH_DTYPES
from ..checkpoints.store import DTYPE_BYTES, INDEX, parse_json
from ..files.atomic import replace_whole, sha256_file, sync_folder, write_whole

PROGRESS = ".mmquant-progress.json"
SHARD_LIMIT = 5_000_000_000
ALIGNMENT = 8
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: safetensors dtype name and shape, known before any value is."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file of the plan: its tensors in order and the header that describes them."""

    name: str
    tensors: tuple[TensorSpec, ...]
    header: bytes

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(t.bytes for t in self.tensors)


def plan_shards(steps: Iterable[Iterable[TensorSpec]], limit: int = SHARD_LIMIT) -> list[Shard]:
    """Fill shards with the steps' tensors in order; each holds at most `limit` bytes of data (or one larger tensor)."""
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
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group), _header(group))
        for i, group in enumerate(groups, 1)
    ]


def _header(tensors: list[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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


class FolderWriter:
    """Writes the planned tensors step by step; `done` steps are on disk already when a run continues."""

    def __init__(
        self, folder: Path, steps: list[list[TensorSpec]], run: Mapping[str, Any], limit: int = SHARD_LIMIT
    ) -> None:
        self.folder, self.run = folder, dict(run)
        self.shards = plan_shards(steps, limit)
        self._step_ends = _cumulative(steps)
        self.sha256: dict[str, str] = {}
        self._shard, self._tensor, self._file = 0, 0, None
        self._digest, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self._hashing: list[Future[None]] = []
        self.done = self._resume()

    @property
    def bytes(self) -> int:
        """Bytes of all shards when finished."""
        return sum(shard.bytes for shard in self.shards)

    def write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Append one step's tensors and make them durable. Every planned tensor must be there as planned."""
        assert step == self.done, (step, self.done)
        self._wait_for_hash()  # of the step before: hashing goes on beside the work between two steps
        wanted = self._step_ends[step] - (self._step_ends[step - 1] if step else 0)
        assert len(tensors) == wanted, (len(tensors), wanted)
        try:
            for _ in range(wanted):
                self._append(tensors)
            self._flush()
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"{self.folder}: {error.strerror} while writing step {step}") from None
        self.done = step + 1
        self._record()

    def finish(self, files: Mapping[str, bytes]) -> list[str]:
        """Write the index and the small files; returns all names, shards first. The caller writes the manifest last."""
        assert self.done == len(self._step_ends)
        assert self._file is None
        self._wait_for_hash()
        table = {spec.name: shard.name for shard in self.shards for spec in shard.tensors}
        total = sum(spec.bytes for shard in self.shards for spec in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        everything = {**files, INDEX: (json.dumps(index, indent=1) + "\n").encode()}
        for name, data in everything.items():
            write_whole(self.folder / name, data)
            self.sha256[name] = hashlib.sha256(data).hexdigest()
        return [shard.name for shard in self.shards] + list(everything)

    def clear_progress(self) -> None:
        """Forget how far the run was; called once the manifest is there."""
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the open shard as it is (its durable part is recorded)."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- one tensor ------------------------------------------------------------------------------------------------

    def _append(self, tensors: Mapping[str, Tensor]) -> None:
        shard = self.shards[self._shard]
        spec = shard.tensors[self._tensor]
        tensor = tensors[spec.name]
        found = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert found == (spec.dtype, spec.shape), (spec, found)
        if self._file is None:
            self._file = open(self._temporary(shard), "wb")
            self._put(shard.header)
        self._put(tensor_bytes(tensor))
        self._tensor += 1
        if self._tensor == len(shard.tensors):
            self.close()
            replace_whole(self._temporary(shard), self.folder / shard.name)
            self._hashing.append(self._hasher.submit(self._keep_digest, shard.name, self._digest))
            self._shard, self._tensor, self._digest = self._shard + 1, 0, hashlib.sha256()

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._hashing.append(self._hasher.submit(self._digest.update, data))  # beside the writing, in order
        self._file.write(data)

    def _keep_digest(self, name: str, digest: hashlib._Hash) -> None:
        self.sha256[name] = digest.hexdigest()

    def _wait_for_hash(self) -> None:
        for part in self._hashing:
            part.result()
        self._hashing = []

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _temporary(self, shard: Shard) -> Path:
        return self.folder / (shard.name + ".tmp")

    # -- resume ----------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        state = {"run": self.run, "steps": self.done, "sha256": dict(self.sha256)}
        write_whole(self.folder / PROGRESS, json.dumps(state).encode())

    def _resume(self) -> int:
        path = self.folder / PROGRESS
        if not path.exists():
            self._record_start()
            return 0
        state = parse_json(path.read_bytes(), str(path))
        steps = state["steps"]
        tensors = self._step_ends[steps - 1] if steps else 0
        for shard in self.shards:
            if tensors < len(shard.tensors):
                break
            tensors -= len(shard.tensors)
            self._shard += 1
            known = state["sha256"].get(shard.name)  # not yet when the run died while it was hashed
            self.sha256[shard.name] = known or sha256_file(self.folder / shard.name)
        self._tensor = tensors
        if tensors:
            self._file = self._reopen(self.shards[self._shard])
        return steps

    def _record_start(self) -> None:
        self.done = 0
        self._record()
        sync_folder(self.folder)

    def _reopen(self, shard: Shard) -> BinaryIO:
        """Open a half-written shard, drop what was not recorded, and hash what was."""
        length = len(shard.header) + sum(t.bytes for t in shard.tensors[: self._tensor])
        path = self._temporary(shard)
        # A crash between a shard's rename and its record leaves the whole file under its final name.
        if not path.exists() and (self.folder / shard.name).exists():
            os.replace(self.folder / shard.name, path)
        file = open(path, "rb+")
        left = length
        while left:
            block = file.read(min(left, 8 << 20))
            if not block:
                raise InputError(f"{path}: {length - left} bytes, expected at least {length}; remove {self.folder}")
            self._digest.update(block)
            left -= len(block)
        file.truncate(length)
        return file


def _cumulative(steps: list[list[TensorSpec]]) -> list[int]:
    ends, total = [], 0
    for step in steps:
        total += len(step)
        ends.append(total)
    return ends


def unfinished_run(folder: Path) -> dict[str, Any] | None:
    """What an unfinished run in this folder was doing, None when there is none."""
    path = folder / PROGRESS
    return parse_json(path.read_bytes(), str(path)).get("run") if path.exists() else None
