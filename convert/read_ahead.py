"""The bytes that a pass needs next, brought into the system's file cache while it works on something else."""

from __future__ import annotations

import threading
from pathlib import Path

from .store import TensorInfo

BLOCK = 8 << 20


def ranges_of(tensors: list[TensorInfo]) -> list[tuple[str, int, int]]:
    """(shard, start, end) of the bytes of some tensors, neighbours joined."""
    found: list[tuple[str, int, int]] = []
    for tensor in sorted(tensors, key=lambda t: (t.shard, t.offset)):
        end = tensor.offset + tensor.size
        if found and found[-1][0] == tensor.shard and found[-1][2] == tensor.offset:
            found[-1] = (tensor.shard, found[-1][1], end)
        else:
            found.append((tensor.shard, tensor.offset, end))
    return found


class ReadAhead:
    """Reads ranges of files on a thread and forgets them; `bytes` of them so far. Files that fail are left alone."""

    def __init__(self, folder: Path, ranges: list[tuple[str, int, int]]) -> None:
        self.bytes, self._folder, self._ranges, self._stop = 0, folder, ranges, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no further block: whoever needs the bytes reads them now."""
        self._stop = True

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        block = bytearray(BLOCK)
        for shard, start, end in self._ranges:
            try:
                with open(self._folder / shard, "rb", buffering=0) as file:
                    file.seek(start)
                    while start < end and not self._stop:
                        got = file.readinto(memoryview(block)[: end - start])
                        if not got:
                            break
                        start, self.bytes = start + got, self.bytes + got
            except OSError:
                continue  # the pass itself will say what is wrong with the file
