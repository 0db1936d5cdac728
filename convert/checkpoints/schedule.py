"""Which shards a pass over the layers needs next, and which it has done with: read off from the tensors it reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from ..models.minimax_m2 import EMBED, layer_of
from .read_ahead import Range, ReadAhead
from .store import LocalFolder, ShardStore, TensorInfo


def step_of(name: str, layers: int) -> int:
    """The pass's step that uses a tensor: embeddings 0, layer L is L+1, final norm and head layers+1."""
    layer = layer_of(name)
    if layer is not None:
        return layer + 1
    return 0 if name == EMBED else layers + 1


class Schedule:
    """Follows whoever reads a checkpoint, so that its store can fetch ahead and delete behind. In a local folder the
    next step's bytes are read ahead into the system's cache.

    The first read of a step plans the shards from there on in their order of use; a read of a later step releases those
    whose last use lies before it; a return to an earlier layer (a second pass, replayed layers) plans anew. `behind`:
    so many steps before the latest one may still be read again. One reader at a time.
    """

    def __init__(self, store: ShardStore, tensors: Mapping[str, TensorInfo], layers: int) -> None:
        self.behind = 0
        self._store, self._tensors, self._layers = store, tensors, layers
        self._step: int | None = None
        self._last: dict[str, int] = {}  # shards not released yet: the step of their last use
        self.ahead = ReadAhead()

    def reading(self, name: str) -> None:
        """A tensor is about to be read; any name of its module will do."""
        step = step_of(name, self._layers)
        if isinstance(self._store, LocalFolder):
            self.ahead.enter(step, self._ranges)
        elif self._step is None or 0 < step < self._step - self.behind:  # embeddings alone may serve a tied head
            self._plan(step)
        elif step > self._step:
            self._step = step
            for shard in [s for s, last in self._last.items() if last < step - self.behind]:
                del self._last[shard]
                self._store.release(shard)

    def _ranges(self, step: int) -> list[Range]:
        assert isinstance(self._store, LocalFolder)
        folder = self._store.folder
        return [(folder / t.shard, t.offset, t.offset + t.size) for t in self._by_step.get(step, [])]

    @cached_property
    def _by_step(self) -> dict[int, list[TensorInfo]]:
        found: dict[int, list[TensorInfo]] = {}
        for name, info in self._tensors.items():
            found.setdefault(step_of(name, self._layers), []).append(info)
        return found

    def _plan(self, first_step: int) -> None:
        first: dict[str, int] = {}
        self._step, self._last = first_step, {}
        for name, info in self._tensors.items():
            step = step_of(name, self._layers)
            if step >= first_step:
                first[info.shard] = min(step, first.get(info.shard, step))
                self._last[info.shard] = max(step, self._last.get(info.shard, step))
        self._store.plan(sorted(first, key=lambda shard: (first[shard], self._last[shard], shard)))
