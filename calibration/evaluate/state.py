"""What an interrupted evaluation leaves: every rank's hidden states after some layer, so that the next run goes on
there.

A folder with one file per rank, layer and run. Files are written at most every `EVERY` seconds, when the first rank
says so, and an older layer's file goes only once all ranks have written the newer one.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...convert.files.atomic import replace_whole
from ..model.hidden import HiddenStates
from ..model.ranks import Ranks

EVERY = 120.0


@dataclass
class State:
    """`folder` is None for a run that leaves nothing."""

    folder: Path | None
    name: str
    every: float
    saved: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path | None, identity: str, ranks: Ranks) -> State:
        """The state of the run that `identity` describes (models, dtypes, tokens) on this many ranks."""
        digest = hashlib.sha256(f"{identity} {ranks.world}".encode()).hexdigest()[:16]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, digest, EVERY)

    def _path(self, layer: int, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-layer{layer:03d}-rank{rank}.pt"

    def _layers(self, rank: int) -> list[int]:
        assert self.folder is not None
        found = self.folder.glob(f"{self.name}-layer*-rank{rank}.pt")
        return sorted(int(path.name.split("-layer")[1].split("-")[0]) for path in found)

    def offer(self, layer: int, hidden: list[HiddenStates], layers: list[list[Tensor]], ranks: Ranks) -> None:
        """Keep the state after `layer` layers if it is time to."""
        if self.folder is None:
            return
        due = time.monotonic() - self.saved >= self.every
        if not ranks.gather(due)[0]:
            return
        path = self._path(layer, ranks.rank)
        temporary = path.with_name(path.name + ".tmp")
        torch.save({"hidden": [h.all() for h in hidden], "layers": layers}, temporary)
        replace_whole(temporary, path)
        ranks.gather(None)
        self._drop(ranks.rank, layer)
        self.saved = time.monotonic()

    def resume(self, hidden: list[HiddenStates], layers: list[list[Tensor]], ranks: Ranks) -> int:
        """Take up the newest layer that every rank has kept: fills `hidden` and `layers`, returns how many are done."""
        if self.folder is None:
            return 0
        common = set.intersection(*(set(found) for found in ranks.gather(self._layers(ranks.rank))))
        if not common:
            return 0
        kept = torch.load(self._path(max(common), ranks.rank), weights_only=True, mmap=True)
        for state, values in zip(hidden, kept["hidden"], strict=True):
            state.put(0, values)
        for mine, theirs in zip(layers, kept["layers"], strict=True):
            mine.extend(theirs)
        return max(common)

    def clear(self, ranks: Ranks) -> None:
        """The run is over: remove its files."""
        if self.folder is not None:
            ranks.gather(None)
            self._drop(ranks.rank, None)

    def _drop(self, rank: int, but: int | None) -> None:
        for layer in self._layers(rank):
            if layer != but:
                self._path(layer, rank).unlink(missing_ok=True)
