"""Write GGUF v3 as a stream: headers from known sizes, data in order, split by size, resumable.

Why not gguf-py's writer: it wants every tensor (or its spill file) before it writes the first byte of data, and cannot
resume.

Layout: magic, version 3, tensor count, key count, keys, tensor infos (offsets from the aligned start of the data),
padding, data. Every tensor starts at a multiple of 32. Source: ggml docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mmquant.errors import InputError
from mmquant.stages import stage

from ...quantize.ggml.types import GGMLType
from ..files.growing import GrowingFiles
from ..files.progress import Progress
from .finite import check_stored
from .metadata import Metadata, pack_string, split_keys
from .mixes import tensor_bytes

ALIGNMENT = 32
PART_BYTES = 48_000_000_000  # the hubs' limit is 50e9 bytes a file


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: `shape` in numpy order (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        """Bytes of its data, without padding."""
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True)
class Part:
    """One file of the set: its name, its header (with padding) and the tensors behind it."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(padded(tensor.bytes) for tensor in self.tensors)


def padded(size: int) -> int:
    """A size rounded up to GGUF's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def packed(metadata: Metadata) -> bytes:
    """The keys and values of a header."""
    return b"".join(pack_string(key) + value.packed() for key, value in metadata.items())


def header(keys: bytes, count: int, tensors: tuple[TensorInfo, ...]) -> bytes:
    """Everything before the tensor data, padded to the alignment; `keys`: `count` of them, packed."""
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), count) + keys)
    offset = 0
    for tensor in tensors:
        out += pack_string(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        out += struct.pack("<IQ", GGMLType[tensor.type], offset)
        offset += padded(tensor.bytes)
    return bytes(out) + bytes(-len(out) % ALIGNMENT)


def plan_parts(stem: str, metadata: Metadata, tensors: tuple[TensorInfo, ...], limit: int = PART_BYTES) -> list[Part]:
    """The files of the set, none above `limit` bytes; one file is STEM.gguf, several are STEM-00001-of-0000N.gguf.

    Raises ValueError when a single tensor (with the metadata in the first file) is larger than the limit.
    """
    keys = packed(metadata)
    first, rest = len(header(keys, len(metadata), ())) + 1024, 1024
    groups: list[list[TensorInfo]] = [[]]
    room = limit - first
    for tensor in tensors:
        need = padded(tensor.bytes) + len(tensor.name) + 64
        if need > room and groups[-1]:
            groups.append([])
            room = limit - rest
        if need > room:
            raise InputError(f"{tensor.name}: {tensor.bytes} bytes do not fit a part of {limit} bytes")
        groups[-1].append(tensor)
        room -= need
    count = len(groups)
    if count == 1:
        return [Part(f"{stem}.gguf", header(keys, len(metadata), tensors), tensors)]
    parts: list[Part] = []
    for index, group in enumerate(groups):
        split = split_keys(index, count, len(tensors))
        before = (keys, len(metadata)) if index == 0 else (b"", 0)
        head = header(before[0] + packed(split), before[1] + len(split), tuple(group))
        parts.append(Part(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf", head, tuple(group)))
    return parts


class GgufWriter(GrowingFiles):
    """Writes a set of parts into `folder`, tensor by tensor in the planned order, on a thread of its own.

    `done` tensors are handed in. A part carries its final name only when it is whole. `checkpoint()` makes what is
    written durable. A writer opened again on the same plan continues behind the last checkpoint; the finished set has
    the same bytes as an uninterrupted one.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        run: Mapping[str, Any] | None = None,
        away: Collection[str] = (),
    ) -> None:
        """`run` names whatever else decides the bytes (settings, statistics).

        away: parts that were published and deleted; a run that continues does not look for them.

        InputError when the folder holds an unfinished run of another one, or a damaged one.
        """
        self.parts, self.away = parts, away
        digest = hashlib.sha256(json.dumps(run or {}, sort_keys=True).encode())
        for part in parts:
            digest.update(part.name.encode() + part.header)
        self.tensors = [(index, tensor) for index, part in enumerate(parts) for tensor in part.tensors]
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder, Progress(folder, run or {}, digest.hexdigest(), len(self.tensors)))
        self._resume()

    @property
    def names(self) -> list[str]:
        """Names of the tensors still to be written, in order."""
        return [tensor.name for _, tensor in self.tensors[self.done :]]

    def whole(self) -> dict[str, int]:
        """Parts that are whole, with how many tensors of the set end with them; waits for what was handed in."""
        self.settle()
        self.progress.checked()
        self.progress.save()
        part = self.tensors[self.done][0] if self.done < len(self.tensors) else len(self.parts)
        ends = accumulate(len(item.tensors) for item in self.parts[:part])
        return {item.name: end for item, end in zip(self.parts[:part], ends, strict=True)}

    def write(self, name: str, data: bytes | np.ndarray) -> None:
        """Hand in the next tensor, which must stay as it is. Name and size must be the planned ones.

        InputError, of a later call, names a tensor that holds NaN or infinity; the set then stays unfinished.
        """
        part, tensor = self.tensors[self.done]
        view = (
            memoryview(np.ascontiguousarray(data).data).cast("B") if isinstance(data, np.ndarray) else memoryview(data)
        )
        assert name == tensor.name, f"{name} written, {tensor.name} is next"
        assert len(view) == tensor.bytes, f"{name}: {len(view)} bytes, expected {tensor.bytes}"
        self.done += 1
        last = self.done == len(self.tensors) or self.tensors[self.done][0] != part
        self._behind.put(partial(self._append, part, tensor, view, last), len(view))

    def checkpoint(self) -> None:
        """Make what was handed in durable and remember it."""
        self.commit()
        self.settle()

    def commit(self, before: Callable[[], object] | None = None, after: Callable[[], object] | None = None) -> None:
        """The same behind the caller: call after each layer. `before` and `after` what is remembered, do these."""
        self._behind.put(partial(self._commit, self.done, before, after))

    def finish(self) -> list[Path]:
        """Paths of the finished parts."""
        self.settle()
        assert self.done == len(self.tensors), f"{len(self.tensors) - self.done} tensors are missing"
        self.progress.checked()
        return [self.folder / part.name for part in self.parts]

    # -- on the writing thread -------------------------------------------------------------------------------------

    def _append(self, part: int, tensor: TensorInfo, view: memoryview, last: bool) -> None:
        with stage("write"):
            check_stored(
                np.frombuffer(view, np.uint8), GGMLType[tensor.type], f"{self.parts[part].name}: {tensor.name}"
            )
        if self._file is None:  # not open, and not left half written by an earlier run
            self._begin(self.parts[part].name, self.parts[part].header)
        self._put(view)
        self._put(bytes(-len(view) % ALIGNMENT))
        if last:
            self._end(self.parts[part].name)

    def _commit(self, done: int, before: Callable[[], object] | None, after: Callable[[], object] | None) -> None:
        if before is not None:
            before()
        self._sync()
        self.progress.done = done
        self.progress.save()
        if after is not None:
            after()

    def _resume(self) -> None:
        """Take up an unfinished run behind its last checkpoint; what lies behind that is cut off."""
        part = self.tensors[self.done][0] if self.done < len(self.tensors) else len(self.parts)
        self.progress.check({item.name: item.bytes for item in self.parts[:part] if item.name not in self.away})
        inside = [tensor for index, tensor in self.tensors[: self.done] if index == part]
        if inside:
            size = len(self.parts[part].header) + sum(padded(tensor.bytes) for tensor in inside)
            self._go_on(self.parts[part].name, size)
