"""Use files from the hub clients' own caches when size and digest match."""

from __future__ import annotations

from pathlib import Path

from .fetch import part_digest
from .hubs import HUBS
from .listing import Listing, RepoFile, RepoSpec


def candidates(spec: RepoSpec, file: RepoFile) -> list[Path]:
    """Where a client would have put this file."""
    return HUBS[spec.hub].candidates(spec, file)


def cached(spec: RepoSpec, file: RepoFile) -> Path | None:
    """A client's copy with the listed size and digest (it is read whole once), or None."""
    for path in candidates(spec, file):
        if path.is_file() and path.stat().st_size == file.size:
            if part_digest(path, file) == file.digest:
                return path
    return None


def offline_listing(spec: RepoSpec) -> Listing | None:
    """What a client's cache knows of a repository: the commit behind the revision, names and digests; else None."""
    return HUBS[spec.hub].offline_listing(spec)
