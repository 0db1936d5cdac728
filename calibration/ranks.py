"""An evaluation over several processes: each takes its share of the windows and reads its share of every layer.

Nothing here starts processes: torchrun does. Alone, every function is the identity. Objects travel by gloo, tensors by
the default group (NCCL on CUDA, gloo on CPU).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..convert.minimax_m2 import Globals, LayerWeights
from ..convert.source import Source, read_globals, read_layer


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; `objects` is the group for pickled values."""

    rank: int = 0
    world: int = 1
    objects: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things, contiguous, sizes differing by one at most."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def shares(self, count: int) -> list[range]:
        """Every rank's part of `count` things."""
        return [replace(self, rank=r).share(count) for r in range(self.world)]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.objects)
        return found


def current_ranks() -> Ranks:
    """The ranks of the process group that is running, or one rank alone. Every process must call it together."""
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    objects = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
    return Ranks(dist.get_rank(), dist.get_world_size(), objects)


def shared_layer(
    source: Source, layer: int, device: torch.device | str, dtype: torch.dtype, ranks: Ranks
) -> LayerWeights:
    """A whole layer, of which each rank has read only its share of the experts."""
    count = source.geometry.experts
    if ranks.world == 1 or count < ranks.world:
        return read_layer(source, layer, device, dtype)
    mine = read_layer(source, layer, device, dtype, ranks.share(count))
    names = ("w1", "w3", "w2")
    return replace(mine, **{name: _spread(getattr(mine, name), count, ranks) for name in names})


def _spread(mine: Tensor, count: int, ranks: Ranks) -> Tensor:
    """[share, ...] of every rank -> [count, ...] on every rank."""
    whole = mine.new_empty((count, *mine.shape[1:]))
    for rank, part in enumerate(ranks.shares(count)):
        rows = whole[part.start : part.stop]
        if rank == ranks.rank:
            rows.copy_(mine)
        dist.broadcast(rows, src=rank)
    return whole


def shared_globals(source: Source, device: torch.device | str, dtype: torch.dtype) -> Globals:
    """Embeddings, final norm and head; small beside a layer's experts, so every rank reads them."""
    return read_globals(source, device, dtype)
