"""The files of a GGUF model on their way: fetched once and in order, kept by step of a pass until the pass is past it.

A step is what is read together: 0 the embeddings, L + 1 layer L, the last one what comes after the layers. Its tensors
lie one behind the other in a file of its own, so that it can go when the next step is read. Every byte of the
repository's files passes a digest; what comes after the layers is given out once all digests are those of the listing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from ..files.atomic import said_of
from .http import TransferError
from .listing import RepoFile

Reader = Callable[[RepoFile, int, int], bytes]  # a file, the first byte, how many


@dataclass(frozen=True)
class Piece:
    """A tensor's bytes [start, stop) of a file (by number), and where they go in the file of their step."""

    file: int
    start: int
    stop: int
    step: int
    place: int


@dataclass(frozen=True)
class Course:
    """What is fetched: the files in order, the pieces of them that are kept (in that order too), the last step.

    heads: what each file begins with, as the plan was made from it
    """

    label: str
    files: Sequence[RepoFile]
    heads: Sequence[bytes]
    pieces: Sequence[Piece]
    last: int

    def end(self, step: int) -> tuple[int, int]:
        """(file, byte) up to which everything is fetched before a step is whole."""
        return max(((p.file, p.stop) for p in self.pieces if p.step == step), default=(0, 0))

    def peak(self) -> int:
        """Most bytes on the disk at once: a step while the next one is fetched, and what comes too early."""
        ends = [self.end(step) for step in range(self.last + 1)]
        found = 0
        for step, until in enumerate(map(max, pairwise([*ends, (0, 0)]))):
            here = (p for p in self.pieces if (p.file, p.start) < until and (p.step >= step or p.step == 0))
            found = max(found, sum(p.stop - p.start for p in here))
        return found


class Flow:
    """Fetches on a thread of its own, up to the step behind the one that is read. One reader at a time."""

    def __init__(self, course: Course, read: Reader, pool: Executor, folder: Path, block: int, at_once: int) -> None:
        """at_once: ranges of `block` bytes that are asked for together."""
        self.course, self.folder, self.block, self.at_once = course, folder, block, at_once
        self._read, self._pool = read, pool
        self._changed = threading.Condition()
        self._at, self._furthest, self._all = (
            -1,
            -1,
            False,
        )  # the step that is read, the last of them, whether all may come
        self._whole: set[int] = set()
        self._gone: set[int] = set()
        self._error: BaseException | None = None
        self._closed = self._verified = False
        self._open: dict[int, IO[bytes]] = {}
        self._left = {step: sum(p.stop - p.start for p in self._of(step)) for step in range(course.last + 1)}
        self._digests = {step: hashlib.sha256() for step in range(course.last + 1)}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def path(self, step: int) -> Path:
        """The file of a step, whole; those of earlier layers go. Raises what stopped the fetching."""
        with self._changed:
            self._at, self._furthest = step, max(self._furthest, step)
            for old in [s for s in self._whole if 0 < s < step]:
                self._whole.remove(old)
                self._gone.add(old)
                self._file(old).unlink()
            last = step == self.course.last or (step == 0 and self._furthest >= self.course.last - 1)
            self._all |= last
            self._changed.notify_all()
            while self._error is None and not (self._verified if last else step in self._whole | self._gone):
                self._changed.wait()
            if self._error is not None:
                raise self._error
        if step in self._gone:
            self._again(step)
        return self._file(step)

    def wants(self, number: int, at: int) -> bool:
        """Whether a byte of a file is fetched before the next step is read."""
        return self._all or (number, at) < max(self.course.end(self._at + ahead) for ahead in (0, 1))

    def close(self) -> None:
        """Stop fetching; nothing stays on the disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(5)  # a connection that hangs is left to its own time limit
        for file in self._open.values():
            with suppress(OSError):  # a full disk has been said, and they go
                file.close()
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            path.unlink()

    # -- inside ----------------------------------------------------------------------------------------------------

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step}.gguf"

    def _of(self, step: int) -> list[Piece]:
        return [piece for piece in self.course.pieces if piece.step == step]

    def _run(self) -> None:
        try:
            for number, file in enumerate(self.course.files):
                digest = hashlib.sha256() if file.sha256 is not None else hashlib.sha1(b"blob %d\0" % file.size)
                head, what = self.course.heads[number], f"{self.course.label} {file.path}"
                for start, data in self._blocks(number, file):
                    digest.update(data)
                    if not data.startswith(head[start : start + len(data)]):
                        raise TransferError(f"{what}: its header differs from the one read before; run again")
                    self._scatter(number, start, data)
                if (found := digest.hexdigest()) != file.digest:
                    raise TransferError(f"{what}: the bytes hash to {found}, the listing says {file.digest}")
            with self._changed:
                self._verified = True
                self._changed.notify_all()
        except BaseException as error:  # the reader raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _blocks(self, number: int, file: RepoFile) -> Iterator[tuple[int, bytes]]:
        """(first byte, bytes) of a file in order, as far as they are wanted; several are asked for at once."""
        coming: deque[tuple[int, Future[bytes]]] = deque()
        at = 0
        while at < file.size or coming:
            while at < file.size and len(coming) < self.at_once and self._wanted(number, at, wait=not coming):
                size = min(self.block, file.size - at)
                coming.append((at, self._pool.submit(self._read, file, at, size)))
                at += size
            start, future = coming.popleft()
            yield start, future.result()

    def _wanted(self, number: int, at: int, wait: bool) -> bool:
        """Whether what is read now, or the step after it, needs this place; `wait` until it does."""
        with self._changed:
            while not (self._closed or self.wants(number, at)):
                if not wait:
                    return False
                self._changed.wait()
            if self._closed:
                raise TransferError("cancelled")
            return True

    def _scatter(self, number: int, start: int, data: bytes) -> None:
        """Put a block's tensors into the files of their steps."""
        stop, view = start + len(data), memoryview(data)
        for piece in self.course.pieces:
            first, end = max(start, piece.start), min(stop, piece.stop)
            if piece.file != number or first >= end:
                continue
            step, part = piece.step, view[first - start : end - start]
            self._digests[step].update(part)
            self._left[step] -= len(part)
            with self._changed:
                past = 0 < step < self._at  # a run that was interrupted goes on behind it
            if not past:
                file = self._open.get(step) or self._open.setdefault(step, open(self._file(step), "wb"))
                with said_of(self._file(step)):
                    file.seek(piece.place + first - piece.start)
                    file.write(part)
            if not self._left[step]:
                self._finish(step, past)

    def _finish(self, step: int, past: bool) -> None:
        if (file := self._open.pop(step, None)) is not None:
            with said_of(self._file(step)):
                file.close()
        with self._changed:
            (self._gone if past else self._whole).add(step)
            if past:
                self._file(step).unlink(missing_ok=True)
            self._changed.notify_all()

    def _again(self, step: int) -> None:
        """A step that is gone, for a second pass: the bytes must be those of the first."""
        digest = hashlib.sha256()
        with said_of(self._file(step)), open(self._file(step), "wb") as out:
            for piece in self._of(step):
                for at in range(piece.start, piece.stop, self.block):
                    size = min(self.block, piece.stop - at)
                    data = self._read(self.course.files[piece.file], at, size)
                    digest.update(data)
                    out.write(data)
        if digest.digest() != self._digests[step].digest():
            raise TransferError(f"{self.course.label}: other bytes of step {step} than the first time")
        with self._changed:
            self._gone.discard(step)
            self._whole.add(step)
