"""Checkpoint of an evaluation: hidden states of every rank, per layer.

A folder with one safetensors file per rank, layer and run, which carries the SHA-256 of its values. Files are written
at most every `EVERY` seconds, when the first rank says so, and an older layer's file goes only once all ranks have
written the newer one. A damaged one is an error that names it, as of every unfinished run (convert/files/progress.py).
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..model.distributed import Ranks
from ..model.hidden import HiddenStates, load_states, save_states

EVERY = 120.0
REMEDY = "delete it to score from the start"


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
            if folder.exists() and not folder.is_dir():
                raise InputError(f"--state {folder}: a file, expected a folder or nothing")
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder, digest, EVERY)

    def _path(self, layer: int, rank: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-layer{layer:03d}-rank{rank}.safetensors"

    def _layers(self, rank: int) -> list[int]:
        assert self.folder is not None
        name = re.compile(rf"{self.name}-layer(\d+)-rank{rank}\.safetensors")
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := name.fullmatch(path.name)))

    def offer(self, layer: int, hidden: list[HiddenStates], layers: list[list[Tensor]], ranks: Ranks) -> None:
        """Keep the state after `layer` layers if it is time to."""
        if self.folder is None:
            return
        due = time.monotonic() - self.saved >= self.every
        if not ranks.gather(due)[0]:
            return
        states = {f"hidden.{i}": found for i, found in enumerate(hidden)}
        sums = {f"layers.{i}": torch.stack(found) for i, found in enumerate(layers) if found}
        save_states(self._path(layer, ranks.rank), states, sums)
        ranks.gather(None)
        self._drop(ranks.rank, layer)
        self.saved = time.monotonic()

    def resume(self, hidden: list[HiddenStates], layers: list[list[Tensor]], ranks: Ranks) -> int:
        """Take up the newest layer that every rank has kept: fills `hidden` and `layers`, returns how many are done.

        InputError, naming the file, when it is damaged.
        """
        newest = self.newest(ranks)
        if not newest:
            return 0
        path = self._path(newest, ranks.rank)
        states = {f"hidden.{i}": found for i, found in enumerate(hidden)}
        sums = load_states(path, states, REMEDY)
        for i, sums_of_layer in enumerate(layers):
            sums_of_layer.extend(sums.get(f"layers.{i}", ()))
        return newest

    def newest(self, ranks: Ranks) -> int:
        """How many layers are done in what every rank has kept; 0 for none."""
        if self.folder is None:
            return 0
        common = set.intersection(*(set(found) for found in ranks.gather(self._layers(ranks.rank))))
        return max(common, default=0)

    def clear(self, ranks: Ranks) -> None:
        """The run is over: remove its files."""
        if self.folder is not None:
            ranks.gather(None)
            self._drop(ranks.rank, None)

    def _drop(self, rank: int, but: int | None) -> None:
        for layer in self._layers(rank):
            if layer != but:
                self._path(layer, rank).unlink(missing_ok=True)
