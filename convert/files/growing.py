"""Grow files over several runs under temporary names, and rename each when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mmquant.stages import stage

from .atomic import CHUNK, TEMPORARY, replace_whole, said_of, sync_file, temporary_of
from .behind import Behind
from .digest import SideDigest
from .progress import Progress, damaged


def begin(path: Path) -> BinaryIO:
    """A new file that will be called `path`."""
    return open(temporary_of(path), "wb")


def go_on(path: Path, length: int, seen: Callable[[bytes], object]) -> BinaryIO:
    """The file that will be called `path`, behind its first `length` bytes, which `seen` is shown; the rest is cut off.

    Killed between a file's last byte and the note of it, it carries its own name already, and loses it again.
    InputError when it is shorter.
    """
    temporary = temporary_of(path)
    if not temporary.exists() and path.exists():
        os.replace(path, temporary)
    if not temporary.exists():
        raise damaged(temporary, "no file", f"the {length} bytes that were written")
    size = temporary.stat().st_size
    if size < length:
        raise damaged(temporary, f"{size} bytes", f"the {length} bytes that were written")
    file = open(temporary, "rb+")
    left = length
    while left:
        block = file.read(min(left, CHUNK))
        seen(block)
        left -= len(block)
    file.truncate(length)
    return file


class GrowingFiles:
    """Files of one folder that are written one after another on a thread of its own, with notes of how far they are.

    `done`: what was handed in, in the units of `progress`.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress, self.done = folder, progress, progress.done
        self._file: BinaryIO | None = None
        self._digest, self._behind = SideDigest(), Behind()

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of the files that are whole, by name."""
        return self.progress.sha256

    def settle(self) -> None:
        """Wait until what was handed in is written; raises what failed."""
        self._behind.wait()

    def clear_progress(self) -> None:
        """Forget how far the run was; called once the manifest is there."""
        self.progress.clear()

    def close(self) -> None:
        """Drop what waits to be written; leave the open file as it is (its durable part is recorded)."""
        self._behind.close()
        self._leave()
        self._digest.close()

    # -- on the writing thread -------------------------------------------------------------------------------------

    def _begin(self, name: str, header: bytes) -> None:
        self._digest.begin()
        self._file = begin(self.folder / name)
        self._put(header)

    def _go_on(self, name: str, length: int) -> None:
        """Behind the first `length` bytes of a file that an earlier run began."""
        self._file = go_on(self.folder / name, length, self._digest.seen)

    def _put(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._digest.update(data)
        with stage("write"), said_of(_final(self._file)):
            self._file.write(data)

    def _sync(self) -> None:
        if self._file is not None:
            with stage("sync"), said_of(_final(self._file)):
                sync_file(self._file)

    def _end(self, name: str) -> None:
        """The open file is whole: it gets its name."""
        self._leave()
        with stage("sync"), said_of(self.folder / name):
            replace_whole(temporary_of(self.folder / name), self.folder / name)
        self.sha256[name] = self._digest.hexdigest()

    def _leave(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with said_of(_final(file)):  # closing writes what is buffered
                file.close()


def _final(file: BinaryIO) -> Path:
    """The name that a growing file will have."""
    return Path(file.name.removesuffix(TEMPORARY))
