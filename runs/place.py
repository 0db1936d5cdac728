"""Check the output folder of a run: what else may lie in it, and starting over."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmquant.errors import InputError

from ..calibration.statistics.store import MANIFEST as STATISTICS
from ..convert.files.atomic import is_temporary
from ..convert.files.lock import HOLDER, LOCK, hold
from ..convert.files.progress import PROGRESS
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
