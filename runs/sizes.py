"""Sizes as users write them, and places that can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mmquant.errors import InputError


def parse_size(text: str) -> int:
    """98GB, 512MiB or plain bytes -> bytes; powers of 1000 for B units, of 1024 for iB units."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    number = text.strip().rstrip("BKMGTIbkmgti").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise InputError(f"{text!r}, expected a size such as 5GB or 512MiB") from None
    if size <= 0:
        raise InputError(f"{text!r}, expected more than 0 bytes")
    return size


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
