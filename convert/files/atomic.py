"""Write files that appear whole: temporary name in the same folder, fsync, rename, fsync of the folder.

Every file that mmquant leaves behind is written by one of these functions, or grown by `growing.py`;
tests/convert/files holds the tree to that. A file under its own name is complete and survives a power failure.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mmquant.errors import InputError

CHUNK = 8 << 20
TEMPORARY = ".tmp"
# What file systems answer that do not have the call at all (CIFS, FUSE, exFAT, Lustre, NFS without locks).
MISSING = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ENOTSUP, errno.EOPNOTSUPP),
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no more can be written here
log = logging.getLogger("mmquant.files")
_warned: set[int] = set()  # devices: one warning a file system and process


def warn_once(folder: Path, what: str) -> None:
    """Say once for each file system that it lacks something on which safety rests, naming the folder."""
    device = folder.stat().st_dev
    if device not in _warned:
        _warned.add(device)
        log.warning("mmquant: %s: this file system has no %s; going on without", folder, what)


def folder_sync_error(folder: Path) -> OSError | None:
    """Make renames inside `folder` durable; the error of a file system that cannot. Raises when the disk fails."""
    if os.name == "nt":  # folders cannot be opened there; NTFS journals its renames
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return error
    return None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, where its file system can; else one warning."""
    error = folder_sync_error(folder)
    if error is not None:
        warn_once(folder, f"fsync of folders ({error.strerror}): a power failure may take finished files with it")


def sync_file(file: BinaryIO) -> None:
    """Bring a file's bytes to the disk. A file system that has no fsync is one warning."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in MISSING - {errno.EBADF}:
            raise
        warn_once(Path(file.name).parent, f"fsync ({error.strerror}): a power failure may take finished files with it")


def temporary_of(path: Path) -> Path:
    """The name under which a file grows until it is whole; one process at a time writes it (`lock.hold`)."""
    return path.with_name(path.name + TEMPORARY)


def is_temporary(name: str) -> bool:
    """Whether a name is that of an unfinished file."""
    return name.endswith(TEMPORARY)


def replace_whole(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its final name; after this call it survives a crash."""
    with open(temporary, "rb+") as file:
        sync_file(file)
    os.replace(temporary, final)
    sync_folder(final.parent)


def replace_folder(made: Path, final: Path) -> None:
    """Give a finished folder of plain files its name; what has it so far must be an empty folder, or nothing."""
    for path in made.iterdir():
        with open(path, "rb+") as file:
            sync_file(file)
    sync_folder(made)
    if final.exists():
        final.rmdir()
    os.replace(made, final)
    sync_folder(final.parent)


@contextmanager
def making(folder: Path) -> Generator[None]:
    """Make a folder and its parents; when the block raises, those that it leaves empty go again."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder or nothing")
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # something was written
            for path in made:
                path.rmdir()
        raise


@contextmanager
def said_of(path: Path) -> Generator[None]:
    """An OSError inside that says no file, because the disk is full, or a temporary one, names `path`."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in FULL
        if unnamed or (error.filename is not None and is_temporary(os.fsdecode(error.filename))):
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path) -> Generator[BinaryIO]:
    """A new file for writing that gets its name when the block ends, and leaves nothing when it raises."""
    temporary = temporary_of(path)
    try:
        with said_of(path):
            with open(temporary, "wb+") as file:
                yield file
            replace_whole(temporary, path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise


def write_whole(path: Path, data: bytes, *, durable: bool = True, shared: bool = False) -> None:
    """Write `data` to `path`, which holds either all of it or what it held before.

    durable False saves the fsync of notes that may be lost in a power failure; shared gives the temporary file a name
    that no other thread or process has, for folders that nobody holds.
    """
    temporary = temporary_of(path.with_name(f"{path.name}.{secrets.token_hex(4)}") if shared else path)
    try:
        with said_of(path):
            with open(temporary, "wb") as file:
                file.write(data)
            if durable:
                replace_whole(temporary, path)
            else:
                os.replace(temporary, path)
    except BaseException:
        if temporary.is_file():
            temporary.unlink()
        raise


def append_line(path: Path, line: str) -> None:
    """Append one line to a log, in one write: a killed process leaves whole lines, a power failure may take some."""
    data = (" ".join(line.splitlines()) + "\n").encode("utf-8", "replace")
    with said_of(path), open(path, "ab", buffering=0) as file:
        file.write(data)


def copy_whole(source: Path, final: Path) -> str:
    """Copy a file and read the copy back before it gets its name; the SHA-256 of both.

    Raises OSError when the copy reads back differently.
    """
    digest = hashlib.sha256()
    with whole_file(final) as target:
        with open(source, "rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
                target.write(block)
        target.flush()
        if sha256_file(Path(target.name)) != digest.hexdigest():
            raise OSError(errno.EIO, f"{final}: the copy reads back differently from {source}, the disk may be failing")
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
