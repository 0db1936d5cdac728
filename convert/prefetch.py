"""Ask the system to have a layer's bytes in the page cache soon, while the layer before it is being used.

Costs no memory of the process. Local files only: a hub store fetches by its own plan.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

from .gguf_names import split_block
from .gguf_reader import GgufSource
from .minimax_m2 import layer_of
from .source import Source
from .store import LocalFolder

GAP = 1 << 20  # ranges closer than this are asked for as one


def layer_ranges(source: Source, layer: int) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, size) of a layer's tensors."""
    if isinstance(source, GgufSource):
        for file in source.files:
            for name, tensor in file.tensors.items():
                if split_block(name)[0] == layer:
                    yield file.path, tensor.offset, tensor.size
        return
    store = getattr(source, "store", None)
    if isinstance(store, LocalFolder):
        for name, info in getattr(source, "tensors", {}).items():
            if layer_of(name) == layer:
                yield store.path(info.shard), info.offset, info.size


def joined(ranges: Iterator[tuple[Path, int, int]]) -> list[tuple[Path, int, int]]:
    """Ranges in the order of the files, neighbours as one."""
    found: list[tuple[Path, int, int]] = []
    for path, offset, size in sorted(ranges):
        if found and found[-1][0] == path and offset <= sum(found[-1][1:]) + GAP:
            start = found[-1][1]
            found[-1] = (path, start, max(sum(found[-1][1:]), offset + size) - start)
        else:
            found.append((path, offset, size))
    return found


def prefetch_layer(source: Source, layer: int) -> Thread:
    """Start reading a layer ahead; join the thread before starting another. Nothing happens beyond the last layer."""
    work = joined(layer_ranges(source, layer)) if hasattr(os, "posix_fadvise") else []
    thread = Thread(target=_ask, args=(work,), daemon=True)
    thread.start()
    return thread


def _ask(work: list[tuple[Path, int, int]]) -> None:
    for path, offset, size in work:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)
