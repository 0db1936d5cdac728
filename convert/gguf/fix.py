"""Write the rescaled model to disk: all files of a set change together, or none does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmquant.errors import FitError, InputError

from .. import manifest
from ..files.atomic import making, said_of, sha256_file, temporary_of, write_whole
from ..files.lock import hold
from ..files.together import complete, interrupted, replace_together
from .doctor import Patch
from .reader import GgufSource


def finish_interrupted(folder: Path) -> list[Path]:
    """Complete a fix in place that was killed among its renames; its files, none when there was none."""
    if not folder.is_dir() or interrupted(folder) is None:
        return []
    with making(folder), hold(folder):
        return complete(folder)


def apply_fix(source: GgufSource, patches: list[Patch], out: Path | None, what: Mapping[str, Any]) -> list[Path]:
    """Write the patched model: into folder `out` (same names), or over the files themselves when None; their paths.

    what: the fix, by which a killed one is recognized. In place, only parts that change are written, and the
    manifest's digests with them. InputError when `out` holds something else, FitError when the disk is too small.
    """
    first = source.files[0].path
    folder = first.parent if out is None else out
    changed = {patch.file for patch in patches}
    files = [file.path for file in source.files if out is not None or file.path in changed]
    with hold(folder):
        if out is not None and (begun := interrupted(out)) is not None:
            if begun != dict(what):
                raise InputError(f"{out}: holds an unfinished fix of another model, expected a new place")
            return complete(out)
        for path in files:
            if out is not None and (out / path.name).exists():
                raise InputError(f"{out / path.name}: exists, expected a new place")
        needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(folder).free
        if needed > free:
            raise FitError(f"{folder}: {needed:,} bytes are needed beside the files, the disk has {free:,} free")
        for path in files:
            with said_of(folder / path.name):
                _write_patched(path, temporary_of(folder / path.name), patches)
        names = [path.name for path in files]
        if out is None and _update_manifest(folder, names):
            names.append(manifest.MANIFEST)
        written = replace_together(folder, names, what)
    return [path for path in written if path.name != manifest.MANIFEST]


def _write_patched(path: Path, temporary: Path, patches: list[Patch]) -> None:
    shutil.copyfile(path, temporary)
    with open(temporary, "rb+") as handle:
        for patch in (patch for patch in patches if patch.file == path):
            handle.seek(patch.offset)
            handle.write(patch.data.tobytes())


def _update_manifest(folder: Path, names: list[str]) -> bool:
    """A manifest with the digests of the new files, waiting under its temporary name; whether there is one."""
    found = manifest.read(folder)
    if found is None:
        return False
    for file in (file for artifact in found["artifacts"] for file in artifact["files"]):
        if file["path"] in names:
            file["sha256"] = sha256_file(temporary_of(folder / file["path"]))
    write_whole(temporary_of(folder / manifest.MANIFEST), manifest.as_bytes(found))
    return True
