"""Track which bytes a pass over the layers reads next, and which it no longer needs.

Shards of a hub are fetched ahead and released; of local files the next layer's bytes are brought into the system's
cache. They are read and forgotten: asking the system to do so (posix_fadvise) fetches only the first megabytes of a
range.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ..models.geometry import Geometry
from .store import ShardStore, TensorInfo

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


def step_of(name: str, geometry: Geometry) -> int:
    """The pass's step that uses a tensor: embeddings 0, layer L is L+1, final norm and head layers+1."""
    layer = geometry.names.layer_of(name)
    if layer is not None:
        return layer + 1
    embed = geometry.names.embed.removesuffix(".weight")
    return 0 if embed in (name, name.rpartition(".")[0]) else geometry.layers + 1


class Schedule:
    """Follows whoever reads a checkpoint, so that its store can fetch ahead and delete behind.

    In a local folder the next step's bytes are read ahead into the system's cache. The first read of a step plans the
    shards from there on in their order of use; a read of a later step releases those whose last use lies before it; a
    return to an earlier layer (a second pass, replayed layers) plans anew, but for the steps that `kept` allows. One
    reader at a time.
    """

    def __init__(self, store: ShardStore, tensors: Mapping[str, TensorInfo], geometry: Geometry) -> None:
        self._behind = 0
        self._store, self._tensors, self._geometry = store, tensors, geometry
        self._step: int | None = None
        self._last: dict[str, int] = {}  # shards not released yet: the step of their last use
        self.ahead = ReadAhead()

    def reading(self, name: str) -> None:
        """A tensor is about to be read; any name of its module will do."""
        step = step_of(name, self._geometry)
        if self._store.is_local:
            self.ahead.enter(step, self._ranges)
        elif self._step is None or 0 < step < self._step - self._behind:  # embeddings alone may serve a tied head
            self._plan(step)
        elif step > self._step:
            self._step = step
            for shard in [s for s, last in self._last.items() if last < step - self._behind]:
                del self._last[shard]
                self._store.release(shard)

    @contextmanager
    def kept(self, behind: int) -> Generator[None]:
        """Inside, so many steps before the latest one may still be read again."""
        before, self._behind = self._behind, max(self._behind, behind)
        try:
            yield
        finally:
            self._behind = before

    def _ranges(self, step: int) -> list[Range]:
        return [(self._store.folder / t.shard, t.offset, t.offset + t.size) for t in self._by_step.get(step, [])]

    @cached_property
    def _by_step(self) -> dict[int, list[TensorInfo]]:
        found: dict[int, list[TensorInfo]] = {}
        for name, info in self._tensors.items():
            found.setdefault(step_of(name, self._geometry), []).append(info)
        return found

    def _plan(self, first_step: int) -> None:
        first: dict[str, int] = {}
        self._step, self._last = first_step, {}
        for name, info in self._tensors.items():
            step = step_of(name, self._geometry)
            if step >= first_step:
                first[info.shard] = min(step, first.get(info.shard, step))
                self._last[info.shard] = max(step, self._last.get(info.shard, step))
        self._store.plan(sorted(first, key=lambda shard: (first[shard], self._last[shard], shard)))
