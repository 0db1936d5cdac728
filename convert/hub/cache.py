"""Use files from the hub clients' own caches when size and digest match."""

from __future__ import annotations

import os
from pathlib import Path

from ..files.parse import path_fault
from .fetch import part_digest
from .http import HF
from .listing import COMMIT, SHA256, Listing, RepoFile, RepoSpec


def hf_cache() -> Path:
    """huggingface_hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def ms_cache() -> Path:
    """modelscope's cache: MODELSCOPE_CACHE, else ~/.cache/modelscope/hub."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or os.path.join("~", ".cache", "modelscope", "hub")).expanduser()


def _hf_folder(spec: RepoSpec) -> Path:
    return hf_cache() / ("models--" + spec.repo.replace("/", "--"))


def candidates(spec: RepoSpec, file: RepoFile) -> list[Path]:
    """Where a client would have put this file."""
    if spec.hub == HF:
        blobs = _hf_folder(spec) / "blobs"
        return [blobs / digest for digest in (file.sha256, file.git) if digest]
    owner, name = spec.repo.split("/")
    repos = (f"{owner}/{name}", f"{owner}/{name.replace('.', '___')}")
    return [ms_cache() / part / repo / file.path for part in ("models", "") for repo in repos]


def cached(spec: RepoSpec, file: RepoFile) -> Path | None:
    """A client's copy with the listed size and digest (it is read whole once), or None."""
    for path in candidates(spec, file):
        if path.is_file() and path.stat().st_size == file.size:
            if part_digest(path, file) == file.digest:
                return path
    return None


def offline_listing(spec: RepoSpec) -> Listing | None:
    """What huggingface_hub's cache knows of a repository: the commit behind the revision, names and digests.

    A snapshot holds links to blobs that are named by their digest (SHA-256 of LFS files, git's SHA-1 of others).
    """
    if spec.hub != HF:
        return None
    folder = _hf_folder(spec)
    reference = folder / "refs" / spec.revision
    commit = spec.revision
    if not COMMIT.fullmatch(commit):
        if not reference.is_file():
            return None
        commit = reference.read_text(errors="replace").strip()
        if not COMMIT.fullmatch(commit):
            return None
    snapshot = folder / "snapshots" / commit
    files = {}
    for path in sorted(snapshot.rglob("*")) if snapshot.is_dir() else []:
        digest = path.resolve().name
        name = path.relative_to(snapshot).as_posix()
        if path.is_file() and (COMMIT.fullmatch(digest) or SHA256.fullmatch(digest)) and not path_fault(name):
            sha256, git = (digest, None) if len(digest) == 64 else (None, digest)
            files[name] = RepoFile(name, path.stat().st_size, sha256, git)
    return Listing(spec, commit, files) if files else None
