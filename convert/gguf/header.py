"""Parse GGUF headers, checking every length against the file before anything is allocated.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3). Data stays where it
is: a tensor is a view of the mapped file.
"""

from __future__ import annotations

import math
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

from ...quantize.ggml.types import GGMLType
from ..files.kinds import LOOK, stranger

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 1024
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
LARGEST = 1 << 60


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: numpy shape (rows last but one, columns last), type, and where its bytes are in the file."""

    name: str
    kind: GGMLType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata and tensors; `data` is the mapped file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    header_bytes: int
    data: NDArray[np.uint8]

    def raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        """A tensor's bytes as rows [rows, bytes of a row], still mapped."""
        part = self.data[tensor.offset : tensor.offset + tensor.size]
        return part.reshape(-1, tensor.kind.row_bytes(tensor.shape[-1]))


class _Cursor:
    """A position in the mapped file; every step forward is checked."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, message: str) -> InputError:
        return InputError(f"{self.path}: {message}: the file is damaged or cut off")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail(f"{what} of {size} bytes at {self.at}, the file has {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at].tobytes()

    def number(self, form: str, what: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, least: int) -> int:
        """A u64 that counts things of `least` bytes or more each, which must fit into the rest of the file."""
        value = self.number("<Q", what)
        if value * least > len(self.data) - self.at:
            raise self.fail(f"{value} {what} in {len(self.data) - self.at} bytes")
        return value

    def text(self, what: str, longest: int | None = None) -> str:
        size = self.count(f"bytes of {what}", 1)
        if longest is not None and size > longest:
            raise self.fail(f"{what} of {size} bytes, expected at most {longest}")
        return self.take(size, what).decode("utf-8", errors="replace")

    def name(self, what: str) -> str:
        """A key or a tensor's name: short and printable, so that an error can quote it."""
        start, name = self.at, self.text(what, LONGEST_NAME)
        if not name.isprintable():
            raise self.fail(f"{what} at {start} is {reprlib.repr(name)}, expected printable text")
        return name


def read_header(path: Path) -> GgufFile:
    """Open a GGUF file by its header alone. Raises ValueError with what is wrong and where."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a GGUF model")
    size = path.stat().st_size
    return parse_header(path, np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8))


def parse_header(path: Path, data: NDArray[np.uint8]) -> GgufFile:
    """The file whose bytes are `data`. Raises ValueError with what is wrong and where."""
    cursor = _Cursor(path, data)
    if (found := stranger(data[:LOOK].tobytes())) is not None and not data[:4].tobytes() == MAGIC:
        raise InputError(f"{path}: {found}; expected a GGUF file")
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise InputError(f"{path}: begins with {magic!r}, expected {MAGIC!r}: not a GGUF file")
    version = cursor.number("<I", "version")
    if version not in VERSIONS:
        order = "big-endian GGUF is not read" if version == 3 << 24 else "expected 2 or 3"
        raise InputError(f"{path}: GGUF version {version}, {order}")
    tensors = cursor.count("tensors", 24)
    pairs = cursor.count("metadata pairs", 13)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.name("metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key} stands twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"type of {key}"), key)
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.fail(f"general.alignment is {reprlib.repr(alignment)}, expected a power of two")
    header = cursor.at
    placed = _place(cursor, infos, -(-cursor.at // alignment) * alignment, alignment)
    return GgufFile(path, metadata, placed, header, data)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:  # noqa: ANN401 - where metadata comes in
    if kind == STRING:
        return cursor.text(key)
    if kind in SCALARS:
        value = np.frombuffer(cursor.take(np.dtype(SCALARS[kind]).itemsize, key), SCALARS[kind])[0].item()
        return bool(value) if kind == BOOL else value
    if kind != ARRAY:
        raise cursor.fail(f"{key} has value type {kind}, expected 0 to 12")
    inner = cursor.number("<I", f"type of {key}")
    if inner == STRING:
        return [cursor.text(key) for _ in range(cursor.count(f"strings of {key}", 8))]
    if inner not in SCALARS:
        raise cursor.fail(f"{key} is an array of value type {inner}, expected numbers or strings")
    width = np.dtype(SCALARS[inner]).itemsize
    count = cursor.count(f"elements of {key}", width)
    return np.frombuffer(cursor.take(count * width, key), SCALARS[inner]).tolist()


def _info(cursor: _Cursor) -> tuple[str, GGMLType, tuple[int, ...], int]:
    """(name, type, numpy shape, offset from the data's start) of the next tensor."""
    name = cursor.name("tensor name")
    dimensions = cursor.number("<I", f"dimensions of {name}")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise cursor.fail(f"{name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
    extents = [cursor.number("<Q", f"dimensions of {name}") for _ in range(dimensions)]
    if any(extent == 0 for extent in extents) or math.prod(extents) > LARGEST:
        raise cursor.fail(f"{name} has dimensions {extents}, expected positive ones")
    number = cursor.number("<I", f"type of {name}")
    try:
        kind = GGMLType(number)
    except ValueError:
        known = " ".join(t.name for t in GGMLType)
        raise InputError(f"{cursor.path}: {name} has ggml type {number}, expected one of {known}") from None
    return name, kind, tuple(reversed(extents)), cursor.number("<Q", f"offset of {name}")


def _place(
    cursor: _Cursor, infos: list[tuple[str, GGMLType, tuple[int, ...], int]], start: int, alignment: int
) -> dict[str, GgufTensor]:
    """Tensors by name, each inside the file, aligned, and apart from every other."""
    placed: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in infos:
        if name in placed:
            raise cursor.fail(f"tensor {name} stands twice")
        if not kind.fits(shape[-1]):
            raise cursor.fail(
                f"{name} {kind.name} has rows of {shape[-1]}, expected a multiple of {kind.block_columns}"
            )
        size = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        if offset % alignment:
            raise cursor.fail(f"{name} starts at {offset}, expected a multiple of {alignment}")
        if start + offset + size > len(cursor.data):
            raise cursor.fail(f"{name} ends at {start + offset + size}, the file has {len(cursor.data)} bytes")
        placed[name] = GgufTensor(name, kind, shape, start + offset, size)
    last: GgufTensor | None = None
    for tensor in sorted(placed.values(), key=lambda t: t.offset):
        if last is not None and last.offset + last.size > tensor.offset:
            raise cursor.fail(f"{tensor.name} starts at {tensor.offset}, inside {last.name}")
        last = tensor
    return placed
