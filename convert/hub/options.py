"""Options of fetching; their defaults are those of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 32 << 20


@dataclass(frozen=True)
class Retry:
    """How often and how patiently: `attempts` without progress, pauses of base * 2^n seconds up to `cap`, jittered."""

    attempts: int = 8
    base: float = 0.5
    cap: float = 30.0
    stall: float = 60.0  # seconds without (enough) bytes before a connection is given up


@dataclass(frozen=True)
class FetchOptions:
    """How shards come: limits on those on disk at once, where they lie, by which transport.

    work       folder for shards and records; None: a folder of the user's cache, asked for the revision's commit anew
    max_disk   bytes; max_shards: files; both count shards from the first byte fetched to their release
    """

    work: Path | None = None
    max_disk: int | None = None
    max_shards: int | None = 8
    keep_shards: bool = False
    transport: str = "http"
    connections: int = 8
    block: int = BLOCK
    retry: Retry = field(default_factory=Retry)
