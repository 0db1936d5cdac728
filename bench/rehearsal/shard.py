"""A shard as bytes that nobody stores: its length, and any slice made on demand; its SHA-256, computed once."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from pathlib import Path

import numpy as np

from .generator import VERSION, fill, key_of
from .model import Layout

KNOWN = Path(__file__).with_name("digests.json")  # of the whole model with seed 0: 125 SHA-256 of 230 GB
PIECE = 8 << 20


class Shard:
    """len() and slices, as of bytes."""

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        self.layout, self.seed = layout, seed
        self._starts = [piece.start for piece in layout.pieces]
        self._keys = [key_of(seed, piece.name) for piece in layout.pieces]

    def __len__(self) -> int:
        return self.layout.bytes

    def __getitem__(self, part: slice) -> bytearray:
        start, stop, _ = part.indices(len(self))
        out = bytearray(max(0, stop - start))
        self.read_into(np.frombuffer(out, np.uint8), start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Bytes [start, start + len(out)) into `out` (uint8)."""
        header, at, stop = self.layout.header, start, start + len(out)
        if at < len(header):
            data = header[at:stop]
            out[: len(data)] = np.frombuffer(data, np.uint8)
            at += len(data)
        number = max(0, bisect_right(self._starts, at) - 1)
        while at < stop:
            piece = self.layout.pieces[number]
            end = min(stop, piece.end)
            fill(out[at - start : end - start], piece.law, self._keys[number], at - piece.start)
            at, number = end, number + 1

    @property
    def identity(self) -> str:
        """What the bytes are made from: the seed, the header, the laws of its tensors."""
        laws = repr([piece.law for piece in self.layout.pieces])
        return hashlib.sha256(f"{VERSION} {self.seed} {laws}".encode() + self.layout.header).hexdigest()

    def sha256(self) -> str:
        """The digest of all bytes: one core makes and hashes about half a gigabyte in a second."""
        digest, piece = hashlib.sha256(), np.empty(PIECE, np.uint8)
        for start in range(0, len(self), PIECE):
            part = piece[: min(PIECE, len(self) - start)]
            self.read_into(part, start)
            digest.update(part.data)
        return digest.hexdigest()


class Digests:
    """Known digests by what the bytes are made from; new ones are computed and added to `path`."""

    def __init__(self, path: Path = KNOWN) -> None:
        self.path = path
        self.known: dict[str, str] = json.loads(KNOWN.read_text()) if KNOWN.is_file() else {}
        self.known |= json.loads(path.read_text()) if path.is_file() else {}

    def of(self, shard: Shard) -> str:
        """The SHA-256 of a shard's bytes."""
        if shard.identity not in self.known:
            self.known[shard.identity] = shard.sha256()
            self.path.write_text(json.dumps(self.known, indent=0, sort_keys=True) + "\n")
        return self.known[shard.identity]
