"""Open and close the model of a run: a folder, a hub's repository or the demo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmquant.errors import InputError
from mmquant.monitor import current

if TYPE_CHECKING:
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.elsewhere import Facts
    from ..convert.hub.store import FetchOptions
    from ..convert.source import Source

Model: TypeAlias = "str | Path | Checkpoint"  # a folder or address, or what `open_model` gave
WORK = ".mmquant.source"  # inside the folder that is written: shards in use, headers, small files


def open_model(model: str, fetch: FetchOptions, out: Path | None = None) -> Checkpoint:
    """Open --model.

    Shards of a hub's model lie inside `out` while they are needed, and the commit is pinned there; without `out` (dry
    runs, inspection) small files and headers go to the user's cache.
    """
    from ..convert.hub.address import parse_address
    from ..convert.open import DEMO, open_native

    if model == DEMO or parse_address(model).spec is None:
        source = open_native(model)
        say_notes(source)
        return source
    if out is not None and (out.is_dir() or not out.exists()):
        fetch = replace(fetch, work=out / WORK)
    source = _open_once(model, fetch) if several_ranks() else open_native(model, fetch)
    say_notes(source)
    return source


def several_ranks() -> bool:
    """Whether torchrun started more processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _open_once(model: str, fetch: FetchOptions) -> Checkpoint:
    """A hub's model that the first rank fetches and reads for all (calibration/model/reading.py)."""
    from ..calibration.model.distributed import world
    from ..calibration.model.divided import from_owner
    from ..convert.hub.elsewhere import RemoteCheckpoint, facts_of
    from ..convert.open import open_native

    if world()[0] != 0:
        return RemoteCheckpoint(from_owner(_not_here))
    source = open_native(model, fetch)
    from_owner(lambda: facts_of(source))
    return source


def _not_here() -> Facts:
    raise AssertionError("the first rank's")


@contextmanager
def opened(model: Model, fetch: FetchOptions | None = None, out: Path | None = None) -> Iterator[Checkpoint]:
    """The model of a run, closed after it; one that is handed over opened stays so."""
    from ..convert.hub.store import FetchOptions

    if not isinstance(model, str | Path):
        yield model
        return
    source = open_model(str(model), fetch or FetchOptions(), out)
    try:
        yield source
    finally:
        close_model(source, out)


def say_notes(source: Source) -> None:
    """What is worth knowing of a model, on stderr."""
    for note in source.notes:
        current().message(note)


def open_any(model: str | Path, fetch: FetchOptions | None = None) -> Source:
    """Open a model or artifact that is only read (`eval`); shards of a hub's pass through the user's cache.

    Under torchrun the first rank alone fetches.
    """
    from ..convert.hub.address import parse_address
    from ..convert.open import DEMO, open_source

    if not several_ranks() or str(model) == DEMO or parse_address(str(model)).spec is None:
        return open_source(model, fetch)
    from ..calibration.model.distributed import world
    from ..calibration.model.reading import FirstReads

    return FirstReads(open_source(model, fetch) if world()[0] == 0 else None)


def close_model(source: Source, out: Path | None = None, finished: bool = False) -> None:
    """Stop fetching. Once the output in `out` is finished nothing of the source is needed again."""
    from ..convert.manifest import MANIFEST

    source.close(finished or (out is not None and (out / MANIFEST).exists()))


def choose_device(name: str | None) -> str:
    """The device to compute on: `cpu`, `cuda` or `cuda:N`; by default a GPU when there is one.

    Raises InputError for anything else, and for a GPU that this machine does not have.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, OverflowError):
        raise InputError(f"{name!r}, expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"{name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{name!r}, expected cpu, cuda or cuda:N")
    return name
