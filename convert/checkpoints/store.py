"""Storage interface of a checkpoint (local folder or hub) and a validating safetensors header parser."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard

from mmquant.errors import InputError, naming

from ..files.kinds import LOOK, refuse_strangers
from ..files.lfs import refuse_pointer
from ..files.parse import SMALL_LIMIT, is_list, is_object, parse_json, path_fault, short, take_map
from ..formats.spec import DTYPE_BYTES
from ..naming import cached_repository

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a shard: where its bytes are (offset from the start of the file)."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: `hf` or `ms` with repository and commit, or `local`, which has neither."""

    hub: str = "local"
    repo: str = ""
    revision: str = ""


class ShardStore(Protocol):
    """A checkpoint's files. Shards are asked for by name; `path` may have to fetch."""

    label: str
    origin: Origin
    folder: Path  # where its files lie on this machine
    is_local: bool  # every file is here: `path` fetches nothing

    def files(self) -> dict[str, int]:
        """Every file's size in bytes."""
        ...

    def small(self, name: str) -> bytes | None:
        """A small file's bytes (config, tokenizer, licence), None when there is none."""
        ...

    def header(self, shard: str) -> list[TensorInfo]:
        """A shard's tensors, read from its header alone."""
        ...

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Some bytes of a shard, without fetching all of it."""
        ...

    def path(self, shard: str) -> Path:
        """A local, whole, verified file; blocks until it is there."""
        ...

    def plan(self, shards: list[str]) -> None:
        """The order in which shards will be used, for prefetching."""
        ...

    def release(self, shard: str) -> None:
        """The last tensor of this shard has been used."""
        ...

    def in_flight(self) -> int:
        """Most bytes that shards will still take on the work folder's disk at once."""
        ...

    def close(self, finished: bool = False) -> None:
        """Stop fetching; `finished`: nothing of it will be needed again."""
        ...


class LocalFolder:
    """A checkpoint in a folder; nothing to fetch, nothing to delete."""

    def __init__(self, folder: Path, label: str | None = None) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder}: not a folder, expected a checkpoint with config.json and safetensors shards")
        self.folder = folder
        self.label = label or str(folder)
        found = cached_repository(folder)
        self.origin, self.is_local = Origin(*found) if found else Origin(), True

    def files(self) -> dict[str, int]:
        """Path -> bytes of every file."""
        found = [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*.jinja")]
        return {p.relative_to(self.folder).as_posix(): p.stat().st_size for p in found if p.is_file()}

    def small(self, name: str) -> bytes | None:
        """Bytes of a small file, None when there is none."""
        path = self.folder / name
        if not path.is_file():
            return None
        if (size := path.stat().st_size) > SMALL_LIMIT:
            raise InputError(f"{path}: {size:,} bytes, expected a small file of at most {SMALL_LIMIT:,}")
        return refuse_pointer(f"{self.label}: {name}", path.read_bytes())

    def header(self, shard: str) -> list[TensorInfo]:
        """The tensors of a shard. InputError for a damaged header."""
        path = self.path(shard)
        with naming(self.label), open(path, "rb") as file:
            refuse_strangers(file.read(LOOK), str(path), "a safetensors file")
            file.seek(0)
            length = header_length(file.read(8), shard, path.stat().st_size)
            return parse_header(file.read(length), shard, path.stat().st_size)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard. InputError when it is cut off."""
        with open(self.path(shard), "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise InputError(f"{self.label}: {shard}: {len(data)} bytes at {offset}, expected {size}")
        return data

    def path(self, shard: str) -> Path:
        """The local file of a shard. InputError when it is missing."""
        path = self.folder / shard
        if not path.is_file():
            raise InputError(f"{self.label}: shard {shard} is missing")
        return path

    def plan(self, shards: list[str]) -> None:
        """Nothing to fetch."""
        del shards

    def release(self, shard: str) -> None:
        """Nothing to delete."""
        del shard

    def in_flight(self) -> int:
        """Shards that are being fetched: none."""
        return 0

    def close(self, finished: bool = False) -> None:
        """Nothing to stop."""
        del finished


def shard_names(store: ShardStore) -> list[str]:
    """The safetensors files of a checkpoint, from the index when there is one.

    Raises ValueError for shards that the index names and the store lacks.
    """
    files = store.files()
    index = store.small(INDEX)
    if index is None:
        found = sorted(name for name in files if name.endswith(".safetensors"))
        if not found:
            raise InputError(f"{store.label}: no safetensors file, expected {INDEX} or model.safetensors")
        return found
    named = sorted(set(weight_map(index).values()))
    missing = [name for name in named if name not in files]
    if missing:
        raise InputError(f"{store.label}: {len(missing)} shards of the index are missing, first {missing[0]}")
    return named


def weight_map(index: bytes) -> dict[str, str]:
    """tensor name -> shard of an index file's bytes; ValueError when it is not one."""
    table = take_map(parse_json(index, INDEX, unique=True), "weight_map", str, INDEX)
    if not table:
        raise InputError(f"{INDEX}: weight_map is empty, expected tensors and their shards")
    for shard in dict.fromkeys(table.values()):
        if shard.startswith(".") or path_fault(shard) or "/" in shard:
            name = next(name for name, where in table.items() if where == shard)
            raise InputError(f"{INDEX}: {short(name)} is in {short(shard)}, expected a file name")
    return table


def header_length(first: bytes, shard: str, file_size: int) -> int:
    """Length of the JSON header from a shard's first 8 bytes, checked against the file before anything is allocated."""
    if len(first) < 8:
        raise InputError(f"{shard}: {len(first)} bytes, too short for a safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > min(HEADER_LIMIT, file_size - 8) or length < 2:
        raise InputError(f"{shard}: header of {length} bytes in a file of {file_size}, the shard is damaged or cut off")
    return length


def parse_header(header: bytes, shard: str, file_size: int) -> list[TensorInfo]:
    """Tensors of a safetensors header (https://github.com/huggingface/safetensors#format), every offset checked.

    Raises ValueError when the header is damaged or the file is shorter or longer than the tensors need.
    """
    start, data = 8 + len(header), parse_json(header, f"{shard} header", unique=True)
    tensors = [_tensor(name, entry, shard, start) for name, entry in data.items() if name != "__metadata__"]
    tensors.sort(key=lambda t: (t.offset, t.size))
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            raise InputError(f"{shard}: {tensor.name} starts at {tensor.offset}, expected {position}")
        position += tensor.size
    if position != file_size:
        state = "truncated" if file_size < position else "followed by other bytes"
        raise InputError(f"{shard}: {file_size} bytes, the header describes {position}: the shard is {state}")
    return tensors


def _tensor(name: str, entry: object, shard: str, start: int) -> TensorInfo:
    if not is_object(entry):
        raise InputError(f"{shard}: entry {short(name)} of the header is not an object")
    if not name.isprintable():
        raise InputError(f"{shard}: {short(name)}: expected a tensor's name of printable characters")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{shard}: {name} has dtype {short(dtype)}, expected one of {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise InputError(
            f"{shard}: {name} has shape {short(shape)} and offsets {short(offsets)}, expected lists of integers"
        )
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise InputError(f"{shard}: {name} {dtype}{shape} lies in {offsets[1] - offsets[0]} bytes, expected {size}")
    return TensorInfo(name, shard, dtype, tuple(shape), start + offsets[0], size)


def _naturals(value: object) -> TypeGuard[list[int]]:
    return is_list(value) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in value)
