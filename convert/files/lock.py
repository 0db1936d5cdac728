"""One process per folder, by an advisory lock that records its owner."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmquant.errors import InputError

from .atomic import MISSING, folder_sync_error, warn_once

with warnings.catch_warnings():  # without fcntl (and not on Windows) it says that it keeps a file instead
    warnings.simplefilter("ignore")
    from filelock import FileLock, Timeout

LOCK, HOLDER = ".mmquant.lock", ".mmquant.holder"


@contextmanager
def hold(folder: Path, wait: float = 0) -> Generator[None]:
    """Hold `folder` while the block runs; InputError naming the holder when another process keeps it over `wait` s.

    The system drops the lock with the process, so a killed run leaves nothing to clean up. On a file system without
    locks, or without fsync of folders, it goes on with one warning.
    """
    path = folder / LOCK
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    held = _acquire(lock, folder, wait)
    try:
        if held:
            with suppress(OSError):
                (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        if held:
            _release(lock, folder)


def _acquire(lock: FileLock, folder: Path, wait: float) -> bool:
    """Whether the lock is ours; False on a file system that has none."""
    missing: list[str] = []
    try:
        lock.acquire(timeout=wait, poll_interval=0.05)
    except Timeout:
        raise InputError(f"{folder}: in use by {_holder(folder)}, expected no other mmquant in this folder") from None
    except OSError as error:
        if error.errno not in MISSING or not os.access(folder, os.W_OK):
            raise
        missing.append(f"file locks ({error.strerror}): run one mmquant at a time in it")
    held = not missing
    error = folder_sync_error(folder)
    if error is not None:
        missing.append(f"fsync of folders ({error.strerror}): a power failure may take finished files with it")
    if missing:
        warn_once(folder, " and no ".join(missing))
    return held


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text("utf-8", errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


def _release(lock: FileLock, folder: Path) -> None:
    """Names go while the lock is held, so that nobody's are removed; open files of Windows only afterwards."""
    with suppress(OSError):
        (folder / HOLDER).unlink()
    if os.name != "nt":
        with suppress(OSError):
            (folder / LOCK).unlink()
    lock.release()
    if os.name == "nt":
        with suppress(OSError):
            (folder / LOCK).unlink()
