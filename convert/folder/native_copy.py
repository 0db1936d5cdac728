"""A verified copy of a checkpoint as released: every file is copied, read back and compared by SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.store import INDEX, shard_names
from ..files.atomic import copy_whole, sha256_file, write_whole
from ..manifest import FileEntry


def copy_native(
    source: Checkpoint, out: Path, carried: Mapping[str, bytes], done: Callable[[str], object]
) -> tuple[FileEntry, ...]:
    """Copy shards and small files (`carried`) into `out`; files that are there already with the same bytes are kept.

    Raises OSError when a copy reads back differently.
    """
    entries = []
    source.store.plan(shard_names(source.store))
    for name in shard_names(source.store):
        digest = _copy(source.store.path(name), out / name)
        entries.append(FileEntry(name, (out / name).stat().st_size, digest))
        source.store.release(name)
        done(name)
    described = {name: source.small_file(name) for name in ("config.json", INDEX)}
    for name, data in {**described, **carried}.items():
        if data is not None:
            (out / name).parent.mkdir(exist_ok=True)
            write_whole(out / name, data)
            entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(entries)


def _copy(path: Path, final: Path) -> str:
    if final.exists() and final.stat().st_size == path.stat().st_size:
        digest = sha256_file(path)
        if sha256_file(final) == digest:
            return digest
    return copy_whole(path, final)
