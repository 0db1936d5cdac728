"""Read the older binary importance matrix (imatrix.dat) of llama-imatrix and ik_llama.cpp.

int32 entries; of each: int32 length, name, int32 calls, int32 values, float32 values (mean of x^2 times calls);
then, in later ones, int32 chunks, int32 length, name of the text. Little endian.
Source: llama.cpp common/imatrix-loader.cpp (legacy files).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

LONGEST_NAME = 1024
LARGEST_FILE = 4 << 30


@dataclass(frozen=True)
class Legacy:
    """Calls and values [n] float32 by weight's name; the text's name and chunks where the file has them."""

    entries: dict[str, tuple[int, NDArray[np.float32]]]
    dataset: str
    chunks: int


class _Reader:
    """A position in the file's bytes; every length is checked against what is left."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int, what: str) -> bytes:
        if not 0 <= size <= len(self.data) - self.at:
            raise InputError(
                f"{self.path}: {what} of {size} bytes at byte {self.at}, {len(self.data) - self.at} are left; "
                "expected an imatrix, in GGUF or the older .dat form"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        length = self.number(what)
        if length > LONGEST_NAME:
            raise InputError(
                f"{self.path}: {what} of {length} bytes, expected an imatrix, in GGUF or the older .dat form"
            )
        return self.take(length, what).decode("utf-8", "replace")


def read_legacy(path: Path) -> Legacy:
    """Read an imatrix.dat. InputError when it is none or cut off."""
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes, expected an imatrix, in GGUF or the older .dat form")
    reader = _Reader(path, path.read_bytes())
    count = reader.number("number of entries")
    if not 0 < count <= len(reader.data) // 12:
        raise InputError(f"{path}: {count} entries, expected an imatrix, in GGUF or the older .dat form")
    entries: dict[str, tuple[int, NDArray[np.float32]]] = {}
    for _ in range(count):
        name, calls = reader.text("name"), reader.number("number of calls")
        values = np.frombuffer(reader.take(4 * reader.number("number of values"), "values"), "<f4")
        if calls < 1 or not values.size:
            raise InputError(f"{path}: {name}: {calls} calls and {values.size} values, expected at least one of each")
        entries[name] = (calls, values.astype(np.float32))
    if reader.at == len(reader.data):
        return Legacy(entries, "", max(calls for calls, _ in entries.values()))
    chunks = reader.number("number of chunks")
    return Legacy(entries, reader.text("name of the text"), max(chunks, 0))
