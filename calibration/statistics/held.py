"""Held-out rows of matrices: a few of each that are in no sum, by which a rounding is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..model.distributed import rank_share, world

HELD, STRIDE = 128, 16  # rows at most, every which row of a matrix
FEWEST = 16  # rows that decide anything


def choose(
    offsets: list[int], met: list[int], count: list[int], places: range, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Which of the next rows are held, and their places of all E * HELD, [C] int64 each; met and count go on.

    Rows are sorted by matrix, matrix first + e owning offsets[e]:offsets[e+1]; places: of the HELD of each.
    """
    rows, taken = list[int](), list[int]()
    for matrix, (start, stop) in enumerate(pairwise(offsets), first):
        begin = start + (STRIDE // 2 - met[matrix]) % STRIDE
        found = range(begin, stop, STRIDE)[: len(places) - count[matrix]]
        place = matrix * HELD + places.start + count[matrix]
        rows += found
        taken += range(place, place + len(found))
        met[matrix] += stop - start
        count[matrix] += len(found)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(taken, dtype=torch.int64)


@dataclass
class HeldRows:
    """By what the rows are of (`rows`: [E, HELD, n] float32, times their router weight, zero where there is none).

    places: of the HELD that this rank may fill; the other ranks fill the others.
    """

    rows: dict[str, Tensor]
    met: list[int] = field(default_factory=list)
    count: list[int] = field(default_factory=list)
    places: range = range(HELD)

    @classmethod
    def empty(cls, matrices: int, inputs: dict[str, int], device: torch.device | str) -> HeldRows:
        """No rows yet; inputs: n by name."""
        rows = {name: torch.zeros(matrices, HELD, n, device=device) for name, n in inputs.items()}
        return cls(rows, [0] * matrices, [0] * matrices, rank_share(HELD, *world()))

    def take(self, offsets: list[int], share: Tensor | None, **rows: Tensor) -> Tensor:
        """Hold some of the next rows [R, n] times `share` [R]; which [C], for whoever sums the rest.

        Rows are sorted by matrix, matrix e owning offsets[e]:offsets[e+1].
        """
        device = next(iter(rows.values())).device
        chosen, places = (index.to(device) for index in choose(offsets, self.met, self.count, self.places))
        for name, values in rows.items():
            some = values[chosen].float()
            some = some if share is None else some * share[chosen].unsqueeze(1)
            self.rows[name].flatten(0, 1)[places] = some.nan_to_num(0.0, 0.0, 0.0)
        return chosen

    def of(self, name: str) -> Tensor:
        """[E, HELD, n] of this rank; alone zeros for matrices with too few rows to decide anything."""
        return self.rows[name] if len(self.places) < HELD else enough(self.rows[name])


def enough(rows: Tensor) -> Tensor:
    """Held-out rows [E, R, n] with zeros for matrices that have too few to decide anything."""
    few = (rows != 0).any(2).sum(1) < FEWEST
    return rows.masked_fill(few.view(-1, 1, 1), 0.0)
