"""A repository's GGUF model read as it is fetched, so that a layer or two of it are on the disk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from mmquant.errors import InputError
from mmquant.stages import stage

from ..checkpoints.store import Origin
from ..gguf.header import GgufFile, GgufTensor
from ..gguf.names import TOKEN_EMBD, split_block
from ..gguf.reader import SAMPLE, GgufSource
from .fetch import need_disk
from .gguf_flow import Course, Flow, Piece
from .gguf_headers import ranged_header
from .gguf_repository import chosen, open_gguf_repository
from .listing import RepoFile
from .options import FetchOptions
from .prefetch import DaemonPool
from .store import HubFolder

READERS = 8  # requests at once for the first bytes of each tensor


class StreamedGguf(GgufSource):
    """Opened from the headers; a pass over the layers fetches the rest ahead of itself and deletes it behind.

    headers  of its files by path, in order, as `hub_gguf_headers` reads them
    """

    def __init__(self, store: HubFolder, kind: str, headers: Mapping[str, GgufFile]) -> None:
        super().__init__(Path(f"{store.label}:{kind}"), list(headers.values()))
        self.store, self.origin = store, Origin(store.hub, store.repo, store.revision)
        self._paths = list(headers)
        self._places: dict[str, Piece] = {}
        lengths = dict.fromkeys(range(self.geometry.layers + 2), 0)
        for number, file in enumerate(self.files):
            for tensor in sorted(file.tensors.values(), key=lambda t: t.offset):
                if (step := self._step(tensor.name)) is not None:
                    piece = Piece(number, tensor.offset, tensor.offset + tensor.size, step, lengths[step])
                    self._places[tensor.name] = piece
                    lengths[step] += tensor.size
        files = [store.listing.files[path] for path in self._paths]
        heads = [file.data[: file.header_bytes].tobytes() for file in self.files]
        self.course = Course(self.label, files, heads, list(self._places.values()), self.geometry.layers + 1)
        self._pool = DaemonPool(store.options.connections)

    def check_room(self) -> None:
        """InputError when --max-disk, OSError when the disk is too small for two layers and what comes too early."""
        needed, limit = self.course.peak(), self.store.options.max_disk
        if limit is not None and needed > limit:
            raise InputError(f"--max-disk {limit:,}: {self.label} needs {needed:,} bytes at a time")
        self.store.folder.mkdir(parents=True, exist_ok=True)
        need_disk(self.store.folder, needed, self.label)

    def close(self, finished: bool = False) -> None:
        """Stop fetching; nothing stays on the disk."""
        self.store.client.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if "flow" in self.__dict__:
            self.flow.close()
        self.store.close(finished)

    def _step(self, name: str) -> int | None:
        """The step of a pass that reads a tensor; None for what no pass reads."""
        block, _ = split_block(name)
        if block is not None:
            return block + 1 if block < self.geometry.layers else None
        return 0 if name == TOKEN_EMBD else self.geometry.layers + 1

    def _entered(self, name: str) -> tuple[GgufFile, GgufTensor]:
        """The tensor in the file of its step, which is waited for."""
        file, tensor = self.locate(name)
        piece = self._places.get(name)
        if piece is None:
            raise InputError(f"{self.label}: {name} is not part of this model")
        with stage("fetch"):
            path = self.flow.path(piece.step)
        data = np.memmap(path, np.uint8, "r")
        return replace(file, path=path, data=data), replace(tensor, offset=piece.place)

    @cached_property
    def flow(self) -> Flow:
        """What is on its way; the first tensor that is read begins it."""
        self.store.hold()
        folder = self.store.folder / "steps"
        folder.mkdir(exist_ok=True)
        for left in folder.iterdir():  # by a run that was killed
            left.unlink()
        options = self.store.options
        self.store.bar.expect(sum(file.size for file in self.course.files))
        return Flow(self.course, self._fetched, self._pool, folder, options.block, options.connections)

    def _fetched(self, file: RepoFile, offset: int, size: int) -> bytes:
        data = self.store.ranged(file, offset, size)
        self.store.bar.advance(size)
        return data

    @cached_property
    def _fingerprint(self) -> str:
        """As a local file's. The first bytes of every tensor are asked for, before the pass comes to them."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor(READERS) as pool:
            for path, file in zip(self._paths, self.files, strict=True):
                first = partial(self._first, self.store.listing.files[path])
                digest.update(file.data[: file.header_bytes].tobytes())
                for data in pool.map(first, file.tensors.values()):
                    digest.update(data)
        return digest.hexdigest()

    def _first(self, file: RepoFile, tensor: GgufTensor) -> bytes:
        return self.store.ranged(file, tensor.offset, min(SAMPLE, tensor.size))


def stream_gguf_repository(spec: str, kind: str | None, options: FetchOptions | None = None) -> GgufSource:
    """Open hf:ORG/NAME[@REV] as a GGUF model of a type, for a pass over its layers.

    One that a hub's cache holds whole, or that is to be kept (--keep-shards), is read there. Raises as
    `open_gguf_repository`.
    """
    options = options or FetchOptions()
    store, found, paths = chosen(spec, kind, options)
    try:
        if options.keep_shards or all(store.is_here(path) for path in paths):
            store.close()
            return open_gguf_repository(spec, kind, options)
        source = StreamedGguf(store, found, {path: ranged_header(store, path) for path in paths})
        source.check_room()
        return source
    except BaseException:
        store.close()
        raise
