"""Download a repository into a folder, verified and resumable."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError, PartialError
from mmquant.monitor import Monitor, watching

from .models import WORK
from .options_use import PullOptions
from .results import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..convert.hub.listing import RepoFile
    from ..convert.hub.store import HubFolder

TOGETHER = 2  # files at once; each comes in parallel ranges


@dataclass(frozen=True)
class Pulled(Result):
    """The files of one commit that were fetched, or with dry_run would be."""

    model: str
    revision: str
    files: int
    bytes: int
    out: Path
    label: str
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        found = {"model": self.model, "revision": self.revision, "files": self.files, "bytes": self.bytes}
        return {**found, "out": str(self.out)}

    def line(self) -> str:
        """The same for people."""
        verb = "would fetch" if self.dry_run else "fetched"
        return f"{verb} {self.files} files, {self.bytes:,} bytes of {self.label} into {self.out}"


def pull(
    model: str,
    out: str | Path,
    options: PullOptions | None = None,
    *,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Pulled:
    """Fetch every file of a repository at one commit into `out`, each checked against the hub's SHA-256.

    model   `hf:ORG/NAME[@REV]` or `ms:ORG/NAME[@REV]`

    Run again it continues. Raises InputError for a repository or glob that names nothing, PartialError when the
    network gives up in between, FitError when the disk is too small.
    """
    from ..convert.hub.store import FetchOptions, hub_source

    chosen, out = options or PullOptions(), Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, expected a folder or nothing")
    fetch = FetchOptions(transport=chosen.transport, keep_shards=True, max_shards=None)
    with watching(monitor):
        store = hub_source(model, fetch if dry_run else replace(fetch, work=out / WORK))
        names = [n for n in sorted(store.files()) if _wanted(n, chosen.include)]
        if not names:
            globs = " ".join(chosen.include)
            raise InputError(f"--include {globs}: none of the {len(store.files())} files of {model} match")
        size = sum(store.files()[n] for n in names)
        if dry_run:
            store.close()
        else:
            fetch_files(store, names, out)
        return Pulled(model, store.revision, len(names), size, out, store.label, dry_run)


def _wanted(name: str, globs: tuple[str, ...]) -> bool:
    return not globs or any(fnmatch(name, glob) for glob in globs)


def fetch_files(store: HubFolder, names: list[str], out: Path) -> None:
    """Bring the named files into `out`; a file that is there with the listed digest is kept.

    Raises PartialError when the network gives up in between.
    """
    from ..convert.files.atomic import copy_whole, replace_whole
    from ..convert.hub.fetch import need_disk, on_disk, part_digest
    from ..convert.hub.http import TransferError

    todo = [n for n in names if not _is_whole(store, out / n, n, part_digest)]
    out.mkdir(parents=True, exist_ok=True)
    arrived = sum(on_disk(path) for path in (out / WORK).rglob("shards/*"))
    need_disk(out, max(0, sum(store.files()[n] for n in todo) - arrived), store.label)

    def one(name: str) -> None:
        path = store.path(name)
        final = out / name
        final.parent.mkdir(parents=True, exist_ok=True)
        if path.is_relative_to(store.folder):
            replace_whole(path, final)
        else:  # a hub's own cache
            copy_whole(path, final)

    try:
        with ThreadPoolExecutor(TOGETHER) as pool:
            for _ in pool.map(one, todo):
                pass
    except TransferError as error:
        here = sum((out / name).is_file() for name in names)
        raise PartialError(f"{error} ({here} of {len(names)} files are here)") from None
    finally:
        store.close()
    shutil.rmtree(out / WORK, ignore_errors=True)


def _is_whole(store: HubFolder, path: Path, name: str, digest: Callable[[Path, RepoFile], str]) -> bool:
    file = store.listing.files[name]
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest(path, file) == file.digest
