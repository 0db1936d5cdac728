"""Held-out rows of matrices: a few of each that are in no sum, by which a rounding is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

HELD, STRIDE = 128, 16  # rows at most, every which row of a matrix
FEWEST = 16  # rows that decide anything


@dataclass
class HeldRows:
    """By what the rows are of (`rows`: [E, HELD, n] float32, times their router weight, zero where there is none)."""

    rows: dict[str, Tensor]
    met: list[int] = field(default_factory=list)
    count: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, matrices: int, inputs: dict[str, int], device: torch.device | str) -> HeldRows:
        """No rows yet; inputs: n by name."""
        rows = {name: torch.zeros(matrices, HELD, n, device=device) for name, n in inputs.items()}
        return cls(rows, [0] * matrices, [0] * matrices)

    def take(self, matrix: int, share: Tensor | None, **rows: Tensor) -> slice:
        """Hold some of the next rows [R, n] of a matrix times `share` [R]; which, for whoever sums the rest."""
        met = len(next(iter(rows.values())))
        first = (STRIDE // 2 - self.met[matrix]) % STRIDE
        room = HELD - self.count[matrix]
        chosen = slice(first, min(met, first + STRIDE * room) if room else 0, STRIDE)
        taken = 0
        for name, values in rows.items():
            some = values[chosen].float()
            taken = len(some)
            some = some if share is None else some * share[chosen].unsqueeze(1)
            self.rows[name][matrix, self.count[matrix] : self.count[matrix] + taken] = some.nan_to_num(0.0, 0.0, 0.0)
        self.met[matrix] += met
        self.count[matrix] += taken
        return chosen

    def of(self, name: str) -> Tensor:
        """[E, HELD, n]; zeros for matrices with too few rows to decide anything."""
        few = torch.tensor([count < FEWEST for count in self.count], device=self.rows[name].device)
        return self.rows[name].masked_fill(few.view(-1, 1, 1), 0.0)
