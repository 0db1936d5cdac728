"""One process a folder: an advisory lock that names its holder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmquant.errors import InputError

LOCK = ".mmquant.lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder` while the block runs; ValueError naming the holder when another process has it.

    The kernel drops the lock with the process, so a killed run leaves nothing to clean up.
    """
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise InputError(f"{folder}: in use by {holder}, expected no other mmquant in this folder") from None
        if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
            raise InputError(f"{folder}: another process has just left this folder, run the command again")
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
