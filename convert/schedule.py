"""When each shard of a checkpoint is needed for the first and the last time in one pass over the layers."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .minimax_m2 import EMBED, layer_of
from .quantized_readers import QuantizedFolder


def step_of(name: str, layers: int) -> int:
    """The pass's step that uses a tensor: embeddings 0, layer L is L+1, final norm and head layers+1."""
    layer = layer_of(name)
    if layer is not None:
        return layer + 1
    return 0 if name == EMBED else layers + 1


class Schedule:
    """Tells a store which shards will be used in which order, and when each has been used for the last time."""

    def __init__(self, source: Checkpoint | QuantizedFolder, first_step: int = 0) -> None:
        self._store = source.store
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        for name, info in source.tensors.items():
            step = step_of(name, source.geometry.layers)
            if name in source.skipped or step < first_step:
                continue
            self._first[info.shard] = min(step, self._first.get(info.shard, step))
            self._last[info.shard] = max(step, self._last.get(info.shard, step))

    def start(self) -> None:
        """Announce the order of use."""
        self._store.plan(sorted(self._first, key=lambda shard: (self._first[shard], self._last[shard], shard)))

    def finished(self, step: int) -> None:
        """Release every shard whose last use was `step`."""
        for shard, last in self._last.items():
            if last == step:
                self._store.release(shard)
