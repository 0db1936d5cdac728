"""Check the output folder of a run: whose it is, what else may lie in it, its disk; start over in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmquant.errors import FitError, InputError

from ..calibration.statistics.store import MANIFEST as STATISTICS
from ..convert import manifest
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import FULL, is_temporary, making
from ..convert.files.difference import first_difference
from ..convert.files.lock import HOLDER, LOCK, hold
from ..convert.files.progress import PROGRESS, unfinished_run
from ..convert.fitting.text import FIT_TEXT
from ..convert.manifest import MANIFEST
from ..convert.source import CARRIED_FILES


def start_over(out: Path) -> None:
    """--fresh: remove the unfinished run in `out`, so that the next one begins there.

    Only files that runs write go; whatever else lies there stays. InputError for a finished run, which is for its owner
    to delete, and for a folder in which no run is.
    """
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / MANIFEST).exists():
        raise InputError(f"--fresh: {out} holds a finished artifact, expected an unfinished run; delete it by hand")
    if not any((out / name).exists() for name in (PROGRESS, STATISTICS, ".mmquant.source")):
        raise InputError(f"--fresh: {out} holds no unfinished run of mmquant")
    with hold(out):
        made = {FIT_TEXT, STATISTICS, "report.html", "config.json", "model.safetensors.index.json", *CARRIED_FILES}
        last = [out / PROGRESS, out / STATISTICS]  # while they are there, the folder is known to be a run's
        for path in sorted(out.iterdir(), key=lambda p: p in last):
            ours = path.name.startswith((".mmquant", ".hidden-")) and path.name not in (LOCK, HOLDER)
            if path.is_dir() and not path.is_symlink():
                if ours:
                    shutil.rmtree(path)
            elif ours or is_temporary(path.name) or path.name in made or path.suffix in (".safetensors", ".gguf"):
                os.unlink(path)


def refuse_strangers(out: Path) -> None:
    """InputError when a folder without a run holds files."""
    names = sorted(path.name for path in out.iterdir())
    strange = [name for name in names if not name.startswith(".mmquant") and not is_temporary(name)]
    if strange:
        raise InputError(f"{out}: holds {strange[0]}, expected an empty folder or an unfinished mmquant run")


def free_bytes(out: Path) -> int:
    """What the disk has on which `out` lies, or will lie."""
    place = next(p for p in (out, *out.absolute().parents) if p.is_dir())
    return shutil.disk_usage(place).free


class OccupiedError(InputError):
    """A folder holds a finished artifact of another run; difference: in words."""

    def __init__(self, message: str, difference: str | None) -> None:
        super().__init__(message)
        self.difference = difference


def is_finished(out: Path, run: Mapping[str, Any]) -> bool:
    """Whether `out` holds this very run, whole. InputError when it holds another finished one or is not a folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, expected a folder or nothing")
    done = manifest.read(out) if out.exists() else None
    if done is None:
        return False
    found = done["artifacts"][0].get("provenance", {}).get("run")
    if found != dict(run):
        raise OccupiedError(occupied(out, found or {}, run, "finished"), first_difference(found or {}, run))
    manifest.check_sizes(out, done)
    return True


@contextmanager
def claim(out: Path, run: Mapping[str, Any]) -> Iterator[None]:
    """Hold `out` for this run: new, empty, or an unfinished run of the same sort. InputError otherwise."""
    with making(out), hold(out):  # first, so that what is found is still so when the run begins
        unfinished = unfinished_run(out)
        if unfinished is None:
            refuse_strangers(out)
        elif unfinished != dict(run):
            raise InputError(occupied(out, unfinished, run, "unfinished"))
        yield


def occupied(out: Path, found: Mapping[str, Any], expected: Mapping[str, Any], state: str) -> str:
    """What to say of a folder in which another run is (`state`: finished or unfinished)."""
    ways = "choose another folder" + (" or start over with --fresh" if state == "unfinished" else "")
    return f"{out}: holds {'an' if state[0] == 'u' else 'a'} {state} run: {first_difference(found, expected)}; {ways}"


def check_place(out: Path, size: int, run: Mapping[str, Any]) -> None:
    """What a real run would refuse after a dry run: a place that is occupied (InputError), a small disk (FitError).

    size: bytes of the whole output. run: as far as it is known without reading any text; the rest is not compared.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, expected a folder or nothing")
    have = 0
    if out.is_dir():
        done, unfinished = manifest.read(out), unfinished_run(out)
        found = done["artifacts"][0].get("provenance", {}).get("run", {}) if done is not None else unfinished
        if found is None:
            refuse_strangers(out)
        elif known := {key: found.get(key) for key in run}:
            if known != dict(run):
                raise InputError(occupied(out, known, run, "finished" if done is not None else "unfinished"))
        have = written_bytes(out)
    if size - have > free_bytes(out):
        raise FitError(f"{out}: {size - have:,} bytes are needed, the disk has {free_bytes(out):,} free")


def written_bytes(out: Path) -> int:
    """Bytes that an unfinished run has on disk already."""
    return sum(p.stat().st_size for p in out.iterdir() if ".safetensors" in p.name or ".gguf" in p.name)


def check_disk(out: Path, needed: int, source: Checkpoint | None = None) -> None:
    """FitError (exit 5) unless the disk of `out` has room for `needed` more bytes, and a hub's shards on their way."""
    needed += source.store.in_flight() if source is not None else 0
    free = shutil.disk_usage(out).free
    if needed > free:
        raise FitError(f"{out}: {needed:,} bytes are needed, the disk has {free:,} free")


def disk_full(error: OSError) -> bool:
    """Whether an OSError means that no more can be written here."""
    return error.errno in FULL


def describe(out: Path, label: str, size: int) -> str:
    """A dry run's line: what would be written, its bytes, and what the disk has."""
    return f"{label}: {size:,} bytes into {out}; the disk has {free_bytes(out):,} free"
