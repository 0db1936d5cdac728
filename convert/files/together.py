"""Change several files of a folder together: all or none, also when killed at any point.

First every new file is whole under its temporary name, then a journal names them all, then they get their names. Before
the journal nothing has changed; from the journal on, `complete` finishes what is left of the renames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .atomic import sha256_file, sync_file, sync_folder, temporary_of, write_whole
from .progress import damaged

JOURNAL = ".mmquant-replace.json"


def replace_together(folder: Path, names: Sequence[str], what: Mapping[str, Any]) -> list[Path]:
    """Give the finished temporary files of `names` (`temporary_of`) their names, in this order; their paths.

    what: says for whom, to be compared by whoever finds the journal. The caller holds the folder.
    """
    digests: dict[str, str] = {}
    for name in names:
        temporary = temporary_of(folder / name)
        with open(temporary, "rb+") as file:
            sync_file(file)
        digests[name] = sha256_file(temporary)
    journal = {"what": dict(what), "files": digests}
    write_whole(folder / JOURNAL, (json.dumps(journal) + "\n").encode())
    return _rename(folder, digests)


def interrupted(folder: Path) -> dict[str, Any] | None:
    """What an interrupted replacement in this folder was for, None when there is none. InputError when damaged."""
    journal = _journal(folder)
    return None if journal is None else journal["what"]


def complete(folder: Path) -> list[Path]:
    """Finish an interrupted replacement; the paths of its files, none when there was nothing to finish.

    InputError, with nothing renamed, when a file is neither new nor waiting with the bytes that the journal names.
    """
    journal = _journal(folder)
    if journal is None:
        return []
    for name, digest in journal["files"].items():
        waiting = temporary_of(folder / name)
        path = waiting if waiting.is_file() else folder / name
        found = sha256_file(path) if path.is_file() else "none"
        if found != digest:
            text = f"SHA-256 {found[:16]}, {folder / JOURNAL} says {digest[:16]}"
            raise damaged(path, text, "the bytes that were to be put there", "fetch or write the model again")
    return _rename(folder, journal["files"])


def _journal(folder: Path) -> dict[str, Any] | None:
    path = folder / JOURNAL
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        what = dict(data["what"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files, what = {}, {}
    if not files or any(Path(name).name != name or name in (".", "..") for name in files):
        raise damaged(path, "not readable", "the journal of a replacement", "fetch or write the model again")
    return {"what": what, "files": files}


def _rename(folder: Path, files: Mapping[str, str]) -> list[Path]:
    for name in files:
        if temporary_of(folder / name).is_file():
            os.replace(temporary_of(folder / name), folder / name)
    sync_folder(folder)
    (folder / JOURNAL).unlink()
    return [folder / name for name in files]
