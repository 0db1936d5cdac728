"""How an evaluation runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..model.engine_like import Like
from ..model.hidden import RAM_LIMIT


@dataclass(frozen=True)
class Settings:
    """How to run: `tokens` a batch; hidden states beyond `ram_limit` bytes go to a file in `folder`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    tokens: int = 8192
    ram_limit: int = RAM_LIMIT
    folder: Path | None = None
    state: Path | None = None  # where an interrupted run leaves what it has
    floor: bool = False  # the reference against itself in the other compute dtype
    floor_seeds: int = 0  # and with sums in other orders, so many times
    floor_orders: int = 0  # and with windows in other orders and batches, so many times
    activations: str = "exact"  # or "llama.cpp": rounded as its CPU backend does (needs float32), of every model
    likes: tuple[Like, ...] = ()  # each candidate also as these engines compute it (needs float32)

    @property
    def other_dtype(self) -> torch.dtype:
        """The compute dtype that the floor is measured in."""
        return torch.bfloat16 if self.dtype == torch.float32 else torch.float32
