"""Pick the files of a type in a GGUF repository, and open them as files, fetched whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mmquant.errors import InputError

from ..checkpoints.store import Origin
from ..gguf.reader import GgufSource
from .fetch import need_disk
from .layout import LABEL, NOT_MODELS, split_of
from .pin import FetchOptions
from .store import HubFolder, hub_source

if TYPE_CHECKING:
    from collections.abc import Mapping


def gguf_models(paths: Iterable[str]) -> dict[str, list[str]]:
    """Type (the quantization that the name ends with, else the name) -> the model's parts in order."""
    found: dict[str, dict[int, str]] = {}
    for path in sorted(paths):
        name = PurePosixPath(path).name
        if not path.endswith(".gguf") or any(word in name for word in NOT_MODELS):
            continue
        stem, part, _ = split_of(path)
        match = LABEL.search(stem)
        found.setdefault(match[1] if match else stem, {})[part] = path
    return {kind: [parts[part] for part in sorted(parts)] for kind, parts in found.items()}


def choose_model(files: Mapping[str, int], kind: str | None, label: str) -> tuple[str, list[str]]:
    """(type, its files) of a repository; InputError with the types that there are."""
    models = gguf_models(files)
    expected = [name for name in models if kind is None or name.lower() == kind.lower()]
    if len(expected) != 1:
        there = ", ".join(models) or "no GGUF model"
        asked = f"no type {kind}" if kind else f"{len(models)} GGUF models"
        raise InputError(f"{label}: {asked} ({there} there), expected one as in {label.split('@')[0]}:TYPE")
    paths = models[expected[0]]
    parts = split_of(paths[0])[2]
    if len(paths) != parts:
        raise InputError(f"{label}: {expected[0]} has {len(paths)} of {parts} parts in the repository")
    return expected[0], paths


def chosen(spec: str, kind: str | None, options: FetchOptions) -> tuple[HubFolder, str, list[str]]:
    """A repository opened for one of its models, the model's type and its files in order."""
    store = hub_source(spec, options)
    try:
        found, paths = choose_model(store.files(), kind, store.label)
    except BaseException:
        store.close()
        raise
    store.folder = store.folder.with_name(f"{store.folder.name}--{found.replace('/', '--')}")  # several types at once
    return store, found, paths


class HubGguf(GgufSource):
    """A GGUF model of a repository: fetched whole and verified when it is opened, deleted when it is finished."""

    def __init__(self, store: HubFolder, kind: str, paths: list[str]) -> None:
        self.store = store
        super().__init__(_fetched(store, paths))
        self.label = f"{store.label}:{kind}"
        self.origin = Origin(store.hub, store.repo, store.revision)

    def close(self, finished: bool = False) -> None:
        """Stop fetching; `finished`: the files go."""
        self.store.close(finished)


def _fetched(store: HubFolder, paths: list[str]) -> Path:
    """The first part, all of them side by side under their own names. OSError when the disk has no room."""
    store.plan(paths)
    there = [store.path(path) for path in paths]
    if all(path.name == PurePosixPath(name).name for path, name in zip(there, paths, strict=True)):
        return there[0]
    folder = store.folder / "named"  # a hub's cache calls files by their digests
    folder.mkdir(parents=True, exist_ok=True)
    for path, name in zip(there, paths, strict=True):
        link = folder / PurePosixPath(name).name
        link.unlink(missing_ok=True)
        os.symlink(path.resolve(), link)
    return folder / PurePosixPath(paths[0]).name


def open_gguf_repository(spec: str, kind: str | None, options: FetchOptions | None = None) -> HubGguf:
    """Open hf:ORG/NAME[@REV] as a GGUF model of a type. Its parts are fetched as far as they are not here.

    Raises InputError when there is no such type, OSError for the network and a full disk.
    """
    options = replace(options or FetchOptions(), max_shards=None)
    store, found, paths = chosen(spec, kind, options)
    try:
        needed = sum(store.files()[path] for path in paths)
        if options.max_disk is not None and needed > options.max_disk:
            raise InputError(f"--max-disk {options.max_disk:,}: {store.label}:{found} has {needed:,} bytes")
        store.folder.mkdir(parents=True, exist_ok=True)
        here = sum(p.stat().st_size for p in store.folder.rglob("*.gguf*") if p.is_file())
        need_disk(store.folder, max(0, needed - here), f"{store.label}:{found}")
        return HubGguf(store, found, paths)
    except BaseException:
        store.close()
        raise
