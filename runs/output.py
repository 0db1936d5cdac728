"""Check that an output path can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmquant.errors import InputError


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written in the end, before any work: InputError. Makes the folder it lies in."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise InputError(f"{option} {path}: a folder, expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}, expected a place that can be written") from None
