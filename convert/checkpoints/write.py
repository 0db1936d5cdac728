"""Write a safetensors file tensor by tensor, each from parts that are made on the way: no tensor is held whole."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..formats.spec import DTYPE_BYTES
from .finite import check_finite


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its parts come one by one (on rank 0; other ranks send theirs while iterating)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_tensors(
    file: BinaryIO, parts: list[Entry], metadata: Mapping[str, str] | None = None, seal: str | None = None
) -> str:
    """A safetensors file (https://github.com/huggingface/safetensors#format), tensor by tensor; its SHA-256.

    seal: the key of the metadata under which the file carries the SHA-256 of its values, which is returned then.
    InputError names an entry that holds NaN or infinity.
    """
    metadata = dict(metadata or {})
    digest = hashlib.sha256()
    file.write(header := _header(parts, metadata | ({seal: digest.hexdigest()} if seal else {})))
    if not seal:
        digest.update(header)
    for data in _bytes(parts):
        digest.update(data)
        file.write(data)
    if seal:
        file.seek(0)
        file.write(_header(parts, metadata | {seal: digest.hexdigest()}))
    return digest.hexdigest()


def _header(parts: list[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in parts:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(parts: list[Entry]) -> Iterator[memoryview]:
    for entry in parts:
        for value in entry.values():
            check_finite(value, entry.name)
            yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
