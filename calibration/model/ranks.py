"""Which part of an evaluation is this process's, and every process's objects gathered; alone, all is the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from .distributed import share, world


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things, contiguous, sizes differing by one at most."""
        return share(count, self.rank, self.world)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on every rank. All ranks must call it together."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def current_ranks() -> Ranks:
    """The ranks that torchrun started, or one rank alone."""
    return Ranks(*world())
