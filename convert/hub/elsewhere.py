"""A hub's checkpoint in a process that does not fetch: names, shapes and small files; another process reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmquant.errors import InputError

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.store import INDEX, Origin, TensorInfo
from ..source import CARRIED_FILES

SMALL_FILES = {"config.json", INDEX, "README.md", *CARRIED_FILES}


@dataclass(frozen=True)
class Facts:
    """What a repository's files, headers and small files say, and the fingerprint of its weights."""

    label: str
    origin: Origin
    folder: Path
    files: dict[str, int]
    small: dict[str, bytes]
    headers: dict[str, list[TensorInfo]]
    fingerprint: str


def facts_of(source: Checkpoint) -> Facts:
    """Of an opened repository; small files are fetched."""
    store = source.store
    files = store.files()
    names = [name for name in files if name in SMALL_FILES or name.endswith(".jinja")]
    small = {name: data for name in names if (data := store.small(name)) is not None}
    shards = sorted({info.shard for info in source.tensors.values()})
    headers = {shard: store.header(shard) for shard in shards}
    return Facts(store.label, store.origin, store.folder, dict(files), small, headers, source.fingerprint)


class Elsewhere:
    """The store of a process that does not fetch."""

    is_local = False

    def __init__(self, facts: Facts) -> None:
        self.facts, self.label, self.origin, self.folder = facts, facts.label, facts.origin, facts.folder

    def files(self) -> dict[str, int]:
        """Every file's size in bytes."""
        return self.facts.files

    def small(self, name: str) -> bytes | None:
        """A small file's bytes, None when there is none."""
        if name in self.facts.files and name not in self.facts.small:
            raise RuntimeError(f"{self.label}: {name} was not handed over")
        return self.facts.small.get(name)

    def header(self, shard: str) -> list[TensorInfo]:
        """A shard's tensors."""
        if shard not in self.facts.headers:
            raise InputError(f"{self.label}: {shard} is not in the repository")
        return self.facts.headers[shard]

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Not here."""
        raise RuntimeError(
            f"{self.label}: {shard} is read by the first process, {size} bytes at {offset} were asked of another"
        )

    def path(self, shard: str) -> Path:
        """Not here."""
        raise RuntimeError(f"{self.label}: {shard} is fetched by the first process alone")

    def plan(self, shards: list[str]) -> None:
        """Nothing to fetch."""

    def release(self, shard: str) -> None:
        """Nothing to delete."""

    def in_flight(self) -> int:
        """Nothing."""
        return 0

    def close(self, finished: bool = False) -> None:
        """Nothing to stop."""


class RemoteCheckpoint(Checkpoint):
    """A checkpoint whose tensors another process reads."""

    def __init__(self, facts: Facts) -> None:
        super().__init__(Elsewhere(facts))
        self._known = facts.fingerprint

    @property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights."""
        return self._known
