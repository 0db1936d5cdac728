"""Read an artifact that is still being written: its plan says where everything will lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmquant.errors import InputError

from ..files.atomic import temporary_of
from .store import Origin, TensorInfo, parse_header


def grown(path: Path) -> Path:
    """Where a file's bytes are: under its name when it is whole, else under its temporary one."""
    return path if path.is_file() else temporary_of(path)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file that may still grow. InputError when they are not there yet."""
    with open(grown(path), "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise InputError(f"{path}: {len(data)} of {size} bytes at {offset} are written")
    return data


class GrowingFolder:
    """A safetensors folder on its way, as a store. headers: shard -> (header with its length, bytes when whole)."""

    def __init__(self, folder: Path, headers: Mapping[str, tuple[bytes, int]], small: Mapping[str, bytes]) -> None:
        self.folder, self.label, self.origin, self.is_local = folder, str(folder), Origin(), True
        self._headers, self._small = dict(headers), dict(small)

    def files(self) -> dict[str, int]:
        """Sizes of all files when they are whole."""
        sizes = {name: len(data) for name, data in self._small.items()}
        return sizes | {name: size for name, (_, size) in self._headers.items()}

    def small(self, name: str) -> bytes | None:
        """A small file's bytes, None when there will be none."""
        return self._small.get(name)

    def header(self, shard: str) -> list[TensorInfo]:
        """A shard's tensors."""
        data, size = self._headers[shard]
        return parse_header(data[8:], shard, size)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard. InputError when they are not there yet."""
        return read_part(self.folder / shard, offset, size)

    def path(self, shard: str) -> Path:
        """The file as far as it is written."""
        return grown(self.folder / shard)

    def plan(self, shards: list[str]) -> None:
        """Nothing to fetch."""

    def release(self, shard: str) -> None:
        """Nothing to delete."""

    def in_flight(self) -> int:
        """Nothing comes."""
        return 0

    def close(self, finished: bool = False) -> None:
        """Nothing is open."""
