"""Hidden states of a run on several ranks: every rank saves its windows; any number of ranks continues with them.

A state is one file STEM of a single process, or STEM.RofN of each of N ranks, of consecutive windows (`rank_share`).
Where every rank has all windows, each writes STEM.wholeR.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmquant.stages import stage

from ...convert.files.behind import Behind
from ...convert.files.progress import damaged
from .distributed import all_have, rank_share, world
from .hidden import HiddenStates, load_states, save_states


@dataclass(frozen=True)
class Saved:
    """Files that hold all windows of a state, and which windows [start, stop) each has."""

    paths: tuple[Path, ...]
    windows: tuple[range, ...]


def part_path(folder: Path, stem: str, own: range, windows: int) -> Path:
    """The file of this rank, which has the windows `own` of `windows`."""
    rank, size = world()
    if size == 1:
        return folder / stem
    return folder / f"{stem}.whole{rank}" if len(own) == windows else folder / f"{stem}.{rank}of{size}"


def find_parts(folder: Path, stem: str, own: range, windows: int) -> Saved | None:
    """What this rank can take its windows from; None when they are not all there."""
    mine = part_path(folder, stem, own, windows)
    if mine.is_file():
        return Saved((mine,), (own,))
    whole = [path for path in (folder / stem, *sorted(folder.glob(f"{stem}.whole*"))) if path.is_file()]
    if whole:
        return Saved((whole[0],), (range(windows),))
    sizes = {int(m[1]) for path in folder.glob(f"{stem}.*of*") if (m := re.search(r"\.\d+of(\d+)$", path.name))}
    for size in sorted(sizes):
        shares = [rank_share(windows, rank, size) for rank in range(size)]
        needed = [r for r, share in enumerate(shares) if share.start < own.stop and own.start < share.stop]
        paths = tuple(folder / f"{stem}.{rank}of{size}" for rank in needed)
        if all(path.is_file() for path in paths):
            return Saved(paths, tuple(shares[rank] for rank in needed))
    return None


def load_parts(saved: Saved, states: Mapping[str, HiddenStates], own: range, remedy: str | None = None) -> None:
    """Fill `states`, whose windows are `own`. InputError as of `load_states`."""
    for path, windows in zip(saved.paths, saved.windows, strict=True):
        load_states(path, states, remedy, windows.start - own.start, len(windows))


def take_part(folder: Path, stem: str, states: Mapping[str, HiddenStates], own: range, windows: int) -> None:
    """`load_parts` of what must be there; all ranks come together. InputError when one of them lacks it."""
    saved = find_parts(folder, stem, own, windows)
    if not all_have(saved is not None) or saved is None:
        path, found = folder / stem, "not there" if saved is None else "not there for another rank"
        raise damaged(path, found, "the hidden states of an unfinished run")
    load_parts(saved, states, own)


def drop_parts(folder: Path, name: str, oldest: int) -> None:
    """Delete states of a name that entered earlier steps than `oldest`: this rank's; the first rank's call, all."""
    rank, size = world()
    for path in folder.glob(f".hidden-*-{name}*"):
        mine = rank == 0 or path.name.endswith(f".{rank}of{size}")
        if mine and int(path.name.split("-")[1]) < oldest:
            path.unlink(missing_ok=True)


class Saver:
    """Saves hidden states in order behind the pass that moves them: copies in host memory of what lies on a device.

    In a group of ranks, and of what lies in host memory, a state is saved when `save` returns.
    """

    def __init__(self) -> None:
        self._behind, self._last = Behind(1 << 62), ""  # what waits is bounded by whoever saves: a step or two

    def save(self, folder: Path, stem: str, states: Mapping[str, HiddenStates], own: range, windows: int) -> None:
        """Write this rank's windows as they are now, unless they are there."""
        path = part_path(folder, stem, own, windows)
        if stem == self._last or path.exists():
            return
        self._last = stem
        folder.mkdir(parents=True, exist_ok=True)
        with stage("copy"):
            copies = {name: found.apart() for name, found in states.items()}
        whole = {name: copy for name, copy in copies.items() if copy is not None}
        self._behind.put(partial(save_states, path, {**states, **whole}))
        if len(whole) < len(copies) or world()[1] > 1:
            self._behind.wait()

    def then(self, work: Callable[[], object]) -> None:
        """Do something when all that was handed in is saved."""
        self._behind.put(work)
        if world()[1] > 1:
            self._behind.wait()

    def settle(self) -> None:
        """Wait until what was handed in is durable; raises what failed."""
        self._behind.wait()

    def stop(self) -> None:
        """Drop what waits; nothing is at work afterwards."""
        self._behind.close()
