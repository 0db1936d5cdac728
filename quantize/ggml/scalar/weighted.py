"""Input and output of a scale search: blocks with their weights, and the scales and codes found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-6  # least importance beside the mean of its block: what never matters still gets a sensible value


@dataclass(frozen=True)
class Weighted:
    """P blocks [P, block] float32 of R rows, and the importance [G * per_row, block] of G groups of R / G rows."""

    x: Tensor
    w: Tensor
    per_row: int

    @property
    def share(self) -> int:
        """Rows that share an importance."""
        return len(self.x) // len(self.w)

    def importance(self) -> Tensor:
        """The importance [P, block] of every block."""
        block = torch.arange(len(self.x), device=self.x.device)
        return self.w[block // (self.per_row * self.share) * self.per_row + block % self.per_row]


@dataclass(frozen=True)
class Found:
    """d, dmin [P] float16; steps, minimums [P, S] int16; codes [P, block] uint8. What a type has not is undefined."""

    d: Tensor
    dmin: Tensor
    steps: Tensor
    minimums: Tensor
    codes: Tensor


def cut(rows: Tensor, block: int, importance: Tensor | None) -> Weighted:
    """Blocks of rows [R, n] float32, importance [G, n] (R a multiple of G) brought to a mean of 1 in each block."""
    x = rows.contiguous().view(-1, block)
    if importance is None:
        return Weighted(x, torch.ones(1, block, device=rows.device), 1)
    table = importance.reshape(-1, block)
    mean = table.mean(1, keepdim=True)
    w = torch.where(mean > 0, table / mean, 1.0).clamp(min=_FLOOR)
    return Weighted(x, w, rows.shape[1] // block)


def empty(blocks: Weighted, subs: int) -> Found:
    """Room for what is found of blocks with `subs` sub-blocks each."""
    count, size = blocks.x.shape
    device = blocks.x.device
    return Found(
        torch.empty(count, dtype=torch.float16, device=device),
        torch.empty(count, dtype=torch.float16, device=device),
        torch.empty(count, subs, dtype=torch.int16, device=device),
        torch.empty(count, subs, dtype=torch.int16, device=device),
        torch.empty(count, size, dtype=torch.uint8, device=device),
    )
