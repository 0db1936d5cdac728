"""A repository's GGUF model by its headers alone: ranges are read, and nothing is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ..gguf.header import GgufFile, parse_header
from ..gguf.reader import GgufSource
from .gguf_repository import choose_model
from .store import HubFolder, hub_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 4 << 20  # bytes of one request; M2.7's header has 10 MB, its vocabulary


class RangedBytes:
    """The bytes of a file on a hub as an array that is sliced; what lies before a slice is fetched in order."""

    def __init__(self, store: HubFolder, path: str) -> None:
        self.store, self.path, self.size = store, path, store.files()[path]
        self._known = bytearray()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> NDArray[np.uint8]:
        start, stop, _ = where.indices(self.size)
        while len(self._known) < stop:
            more = min(max(PIECE, stop - len(self._known)), self.size - len(self._known))
            self._known += self.store.read(self.path, len(self._known), more)
        return np.frombuffer(bytes(self._known[start:stop]), np.uint8)


def hub_gguf_headers(spec: str, kind: str | None) -> tuple[str, GgufSource]:
    """(type, model) of hf:ORG/NAME[@REV], without its tensors' values. InputError when there is no such type."""
    store = hub_source(spec)
    try:
        found, paths = choose_model(store.files(), kind, store.label)
        files = [ranged_header(store, path) for path in paths]
        return found, GgufSource(Path(f"{store.label}:{found}"), files)
    finally:
        store.close()


def ranged_header(store: HubFolder, path: str) -> GgufFile:
    """A file's metadata and tensors, read by ranges; its `data` are the bytes that were needed for that."""
    return parse_header(Path(path), cast("NDArray[np.uint8]", RangedBytes(store, path)))
