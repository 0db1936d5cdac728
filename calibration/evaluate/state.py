"""Checkpoint of an evaluation: hidden states of every rank, per layer.

A folder with one safetensors file per rank, layer and run, which carries the SHA-256 of its values. Files are written
at most every `EVERY` seconds, when the first rank says so, and an older layer's file goes only once all ranks have
written the newer one. A damaged one is an error that names it, as of every unfinished run (convert/files/progress.py).
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmquant.errors import InputError

from ...convert.files.atomic import whole_file
from ...convert.files.progress import damaged
from ..model.distributed import Ranks
from ..model.hidden import HiddenStates
from ..statistics.file import Entry, write_tensors

EVERY = 120.0
WINDOWS = 8  # read and written at a time
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
        parts = [_hidden_entry(i, h) for i, h in enumerate(hidden)]
        parts += [_layers_entry(i, found) for i, found in enumerate(layers) if found]
        digest = hashlib.sha256()
        for value in (value for part in parts for value in part.values()):
            digest.update(_bytes(value))
        with whole_file(self._path(layer, ranks.rank)) as file:
            write_tensors(file, parts, {"sha256": digest.hexdigest()})
        ranks.gather(None)
        self._drop(ranks.rank, layer)
        self.saved = time.monotonic()

    def resume(self, hidden: list[HiddenStates], layers: list[list[Tensor]], ranks: Ranks) -> int:
        """Take up the newest layer that every rank has kept: fills `hidden` and `layers`, returns how many are done.

        InputError, naming the file, when it is damaged.
        """
        if self.folder is None:
            return 0
        common = set.intersection(*(set(found) for found in ranks.gather(self._layers(ranks.rank))))
        if not common:
            return 0
        path = self._path(max(common), ranks.rank)
        try:
            _read(path, hidden, layers)
        except (SafetensorError, OSError) as error:
            raise damaged(path, f"not readable ({error})", "the state of an evaluation", REMEDY) from None
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


def _hidden_entry(index: int, hidden: HiddenStates) -> Entry:
    return Entry(f"hidden.{index}", "F32", hidden.shape, _batches(hidden))


def _batches(hidden: HiddenStates) -> Callable[[], Iterator[Tensor]]:
    return lambda: (values for _, values in hidden.batches(WINDOWS))


def _layers_entry(index: int, found: list[Tensor]) -> Entry:
    values = torch.stack(found)
    return Entry(f"layers.{index}", "F64", tuple(values.shape), lambda: iter([values]))


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _read(path: Path, hidden: list[HiddenStates], layers: list[list[Tensor]]) -> None:
    """Fill `hidden` and `layers` in the order in which they were written, and compare the digest."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wanted = {f"hidden.{i}": h.shape for i, h in enumerate(hidden)}
        if {name: shape for name, shape in shapes.items() if name.startswith("hidden.")} != wanted:
            raise damaged(path, f"hidden states {shapes}", f"{wanted}", REMEDY)
        for i, state in enumerate(hidden):
            values = file.get_slice(f"hidden.{i}")
            for start in range(0, state.shape[0], WINDOWS):
                part = values[start : start + WINDOWS]
                digest.update(_bytes(part))
                state.put(start, part)
        for i, mine in enumerate(layers):
            if f"layers.{i}" in shapes:
                found = file.get_tensor(f"layers.{i}")
                digest.update(_bytes(found))
                mine.extend(found)
        known = (file.metadata() or {}).get("sha256")
    if digest.hexdigest() != known:
        raise damaged(path, f"SHA-256 {digest.hexdigest()[:16]}", f"{str(known)[:16]} as it was written", REMEDY)
