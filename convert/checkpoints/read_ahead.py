"""The bytes that a pass needs next, brought into the system's file cache while it works on something else.

They are read and forgotten: asking the system to do so (posix_fadvise) fetches only the first megabytes of a range.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

BLOCK = 8 << 20

Range = tuple[Path, int, int]  # a file, the first byte and the one after the last


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in the order of the files, neighbours as one."""
    found: list[Range] = []
    for path, start, end in sorted(ranges):
        if found and found[-1][0] == path and found[-1][2] == start:
            start = found.pop()[1]
        found.append((path, start, end))
    return found


class ReadAhead:
    """Follows a pass from step to step (layers); `bytes`: read so far. Files that fail are left alone."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.bytes = 0
        self._thread: threading.Thread | None = None

    def enter(self, step: int, ranges: Callable[[int], Iterable[Range]]) -> None:
        """The pass reads `step` now: what is left of that is its own to read, `ranges` of the next step follow."""
        if step == self.step:
            return
        self.step = step
        self._thread = threading.Thread(target=self._run, args=(step, joined(ranges(step + 1))), daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the next step's bytes are there."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, step: int, ranges: list[Range]) -> None:
        block = memoryview(bytearray(BLOCK))
        for path, start, end in ranges:
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(start)
                    while start < end and self.step == step:
                        got = file.readinto(block[: end - start])
                        if not got:
                            break
                        start, self.bytes = start + got, self.bytes + got
            except OSError:
                continue  # the pass itself will say what is wrong with the file
