"""Streaming GGUF v3 writer: headers first from known sizes, tensor data in order, split by size, resumable.

Why not gguf-py's writer: it wants every tensor (or its spill file) before it writes the first byte of data, and cannot
resume.
Layout: magic, version 3, tensor count, key count, keys, tensor infos (offsets from the aligned start of the data),
padding, data; every
tensor starts at a multiple of 32. Source: ggml docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmquant.errors import InputError

from ...quantize.ggml.types import GGMLType
from ..files.atomic import CHUNK, replace_whole, write_whole
from ..folder.writer import PROGRESS
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
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True)
class Part:
    """One file of the set: its name, its header (with padding) and the tensors behind it."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(padded(tensor.bytes) for tensor in self.tensors)


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(metadata: Metadata, tensors: tuple[TensorInfo, ...]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += pack_string(key) + value.packed()
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
    first, rest = len(header(metadata, ())) + 1024, 1024
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
        return [Part(f"{stem}.gguf", header(metadata, tensors), tensors)]
    parts = []
    for index, group in enumerate(groups):
        keys = {**(metadata if index == 0 else {}), **split_keys(index, count, len(tensors))}
        parts.append(Part(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf", header(keys, tuple(group)), tuple(group)))
    return parts


class GgufWriter:
    """Writes a set of parts into `folder`, tensor by tensor in the planned order.

    A part carries its final name only when it is whole. `checkpoint()` makes what is written durable; a writer opened
    again on the same
    plan continues behind the last checkpoint (`done` tensors) and the finished set has the same bytes as an
    uninterrupted one.
    """

    def __init__(self, folder: Path, parts: list[Part], run: Mapping[str, Any] | None = None) -> None:
        """`run` names whatever else decides the bytes (settings, statistics); another run or header starts anew."""
        self.folder, self.parts, self.run = folder, parts, dict(run or {})
        digest = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode())
        for part in parts:
            digest.update(part.name.encode() + part.header)
        self.fingerprint = digest.hexdigest()
        self.tensors = [(index, tensor) for index, part in enumerate(parts) for tensor in part.tensors]
        self.journal = folder / PROGRESS
        self.sha256: dict[str, str] = {}
        self._file: IO[bytes] | None = None
        self._part = -1
        self._digest = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        self.done = self._resume()
        self.checkpoint()

    @property
    def names(self) -> list[str]:
        """Names of the tensors still to be written, in order."""
        return [tensor.name for _, tensor in self.tensors[self.done :]]

    def write(self, name: str, data: bytes | np.ndarray) -> None:
        """Append the next tensor. Name and size must be the planned ones (a slip of ours: AssertionError)."""
        part, tensor = self.tensors[self.done]
        view = (
            memoryview(np.ascontiguousarray(data).data).cast("B") if isinstance(data, np.ndarray) else memoryview(data)
        )
        assert name == tensor.name, f"{name} written, {tensor.name} is next"
        assert len(view) == tensor.bytes, f"{name}: {len(view)} bytes, expected {tensor.bytes}"
        self._open(part)
        self._put(view)
        self._put(bytes(-len(view) % ALIGNMENT))
        self.done += 1
        if self.done == len(self.tensors) or self.tensors[self.done][0] != part:
            self._finish_part()

    def checkpoint(self) -> None:
        """Make what is written durable and remember it: call after each layer."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        state = {"run": self.run, "fingerprint": self.fingerprint, "done": self.done, "sha256": self.sha256}
        write_whole(self.journal, json.dumps(state).encode())

    def finish(self) -> list[Path]:
        """Paths of the finished parts."""
        assert self.done == len(self.tensors), f"{len(self.tensors) - self.done} tensors are missing"
        return [self.folder / part.name for part in self.parts]

    def restart(self) -> None:
        """Forget what is written and begin again."""
        self.close()
        self.journal.unlink(missing_ok=True)
        self.done = self._resume()
        self.checkpoint()

    def clear_progress(self) -> None:
        """Forget how far the run was; called once the manifest is there."""
        self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the files as they are (after an error); what was checkpointed is found again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _temporary(self, part: int) -> Path:
        return self.folder / (self.parts[part].name + ".tmp")

    def _open(self, part: int) -> None:
        """Begin a part with its header, or go on behind what `_resume` left of it."""
        if self._file is not None:
            return
        path = self._temporary(part)
        self._digest = hashlib.sha256()
        self._part = part
        if not path.exists():
            self._file = open(path, "wb")
            self._put(self.parts[part].header)
            return
        self._file = open(path, "rb+")
        while block := self._file.read(CHUNK):
            self._digest.update(block)

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def _finish_part(self) -> None:
        assert self._file is not None
        self.close()
        name = self.parts[self._part].name
        replace_whole(self._temporary(self._part), self.folder / name)
        self.sha256[name] = self._digest.hexdigest()

    def _resume(self) -> int:
        """Tensors already safe on disk; anything of another run, or behind the last checkpoint, is cut off."""
        done, self.sha256 = self._journal()
        part = self.tensors[done][0] if done < len(self.tensors) else len(self.parts)
        inside = [tensor for index, tensor in self.tensors[:done] if index == part]
        size = len(self.parts[part].header) + sum(padded(tensor.bytes) for tensor in inside) if inside else 0
        if inside and not self._temporary(part).exists() and (self.folder / self.parts[part].name).exists():
            os.replace(self.folder / self.parts[part].name, self._temporary(part))  # killed between rename and journal
        whole = all(_size(self.folder / item.name) == item.bytes for item in self.parts[:part])
        if not whole or (inside and _size(self._temporary(part)) < size):
            done, part, size, self.sha256 = 0, 0, 0, {}
        for index in range(part, len(self.parts)):
            if index > part or size == 0:
                self._temporary(index).unlink(missing_ok=True)
        if size:
            os.truncate(self._temporary(part), size)
        return done

    def _journal(self) -> tuple[int, dict[str, str]]:
        try:
            state = json.loads(self.journal.read_bytes())
            if state["fingerprint"] == self.fingerprint and 0 <= state["done"] <= len(self.tensors):
                return int(state["done"]), dict(state["sha256"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return 0, {}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
