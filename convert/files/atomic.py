"""Files that appear whole: a temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHUNK = 8 << 20


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_whole(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its final name; after this call it survives a crash."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    sync_folder(final.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds either all of it or what it held before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        replace_whole(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
