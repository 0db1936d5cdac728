"""Held-out rows of matrices: a few of each that are in no sum, by which a rounding is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.distributed import rank_share, world

HELD, STRIDE = 128, 16  # rows at most, every which row of a matrix
FEWEST = 16  # rows that decide anything


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

    def take(self, matrix: int, share: Tensor | None, **rows: Tensor) -> slice:
        """Hold some of the next rows [R, n] of a matrix times `share` [R]; which, for whoever sums the rest."""
        met = len(next(iter(rows.values())))
        first = (STRIDE // 2 - self.met[matrix]) % STRIDE
        room = len(self.places) - self.count[matrix]
        chosen = slice(first, min(met, first + STRIDE * room) if room else 0, STRIDE)
        taken = 0
        for name, values in rows.items():
            some = values[chosen].float()
            taken = len(some)
            some = some if share is None else some * share[chosen].unsqueeze(1)
            place = self.places.start + self.count[matrix]
            self.rows[name][matrix, place : place + taken] = some.nan_to_num(0.0, 0.0, 0.0)
        self.met[matrix] += met
        self.count[matrix] += taken
        return chosen

    def of(self, name: str) -> Tensor:
        """[E, HELD, n] of this rank; alone zeros for matrices with too few rows to decide anything."""
        return self.rows[name] if len(self.places) < HELD else enough(self.rows[name])


def enough(rows: Tensor) -> Tensor:
    """Held-out rows [E, R, n] with zeros for matrices that have too few to decide anything."""
    few = (rows != 0).any(2).sum(1) < FEWEST
    return rows.masked_fill(few.view(-1, 1, 1), 0.0)
