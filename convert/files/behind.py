"""Do work in order on one thread behind whoever hands it in, with a bound on what waits."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextvars import copy_context

from mmquant.stages import behind, stage

MOST = 4 << 30
SHARE = 16  # of the machine's memory, at most one such part waits


def waiting_bytes() -> int:
    """Bytes that may wait to be written by one thread: 4 GiB, on small machines a 16th of their memory."""
    try:
        return min(MOST, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // SHARE)
    except (AttributeError, ValueError, OSError):  # Windows
        return MOST // SHARE


class Behind:
    """One thread, and what it still has to do, of at most `limit` bytes. The thread ends when there is nothing left.

    The first error is the last thing that happens: what waits is dropped, and every later call raises that error.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = waiting_bytes() if limit is None else limit
        self._changed = threading.Condition()
        self._work: deque[tuple[Callable[[], object], int]] = deque()
        self._held = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], object], size: int = 0) -> None:
        """Hand in work that holds `size` bytes; waits until there is room for them."""
        context = copy_context()

        def job() -> None:
            context.run(_marked, work)

        with self._changed:
            self._until(lambda: not self._held or self._held + size <= self._limit)
            self._work.append((job, size))
            self._held += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="behind", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until everything that was handed in is done."""
        with self._changed:
            self._until(lambda: self._thread is None)

    def close(self) -> None:
        """Drop what waits, and let what runs end; raises nothing."""
        with self._changed:
            self._work.clear()
            while self._thread is not None:
                self._changed.wait(1.0)

    def _until(self, ready: Callable[[], bool]) -> None:
        if self._failure is None and not ready():
            with stage("wait"):
                while self._failure is None and not ready():
                    self._changed.wait(1.0)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._work:
                    self._thread, self._held = None, 0
                    self._changed.notify_all()
                    return
                job, size = self._work.popleft()
            try:
                job()
            except BaseException as error:  # handed to whoever comes next
                with self._changed:
                    self._failure = error
                    self._work.clear()
            del job
            with self._changed:
                self._held = max(0, self._held - size)
                self._changed.notify_all()


def _marked(work: Callable[[], object]) -> None:
    with behind():
        work()
