"""Publish: large files first, card and manifest last, few commits, resumable from a ledger."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ..files.atomic import sha256_file, write_whole
from ..files.parse import parse_json, take, take_map
from .http import TransferError
from .hubs import HUBS
from .ledger import COMMITTED, LEDGER
from .listing import Listing, RepoFile, digest_matches
from .remote import Conflict, Remote, Upload, is_inline

BATCH_FILES = 50  # Hugging Face recommends fewer than 100 files a commit; 128 commits an hour are its limit
BATCH_BYTES = 20 * 10**9  # with --delete-after-upload: what waits on disk for its commit
ENTRY = {"size": int, "mtime_ns": int, "sha256": str, "state": str}
log = logging.getLogger("mmquant.hub")


class Ledger:
    """What is known of a folder's files on their way to one repository: digests, and which are committed.

    path -> {local, size, mtime_ns, sha256, state}; written whole after every change. A file that was deleted after its
    commit lives on here, so that sums and manifest still name it.
    """

    def __init__(self, folder: Path, remote: Remote) -> None:
        spec = remote.spec
        self.path = folder / f"{LEDGER}.{spec.hub}.{spec.repo.replace('/', '--')}.json"
        self.request: str | None = None
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                data = parse_json(self.path.read_bytes(), str(self.path))
                self.request = take(data, "request", str, str(self.path), None)
                self.files = take_map(data, "files", dict, str(self.path))
                for entry in self.files.values():
                    [take(entry, key, kind, str(self.path)) for key, kind in ENTRY.items()]
            except InputError:
                raise InputError(f"{self.path}: not a ledger, delete it to hash and compare everything anew") from None

    def save(self) -> None:
        """Write it whole."""
        data = {"request": self.request, "files": self.files}
        write_whole(self.path, (json.dumps(data, indent=1) + "\n").encode())

    def upload(self, path: str, local: Path, sha256: str | None = None) -> Upload:
        """The file with its digest, hashed anew only when size or time differ from what was hashed.

        sha256: what its writer hashed; the hub refuses bytes that have another.
        """
        stat = local.stat()
        known = self.files.get(path, {})
        if (known.get("size"), known.get("mtime_ns")) != (stat.st_size, stat.st_mtime_ns):
            digest = sha256 or sha256_file(local)
            known = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest, "state": "hashed"}
            self.files[path] = known
            self.save()
        return Upload(path, local, stat.st_size, str(known["sha256"]))

    def mark(self, files: Sequence[Upload], state: str) -> None:
        """Note a new state of some files."""
        for file in files:
            self.files[file.path]["state"] = state
        self.save()

    def committed(self) -> dict[str, Upload]:
        """Files that are on the hub according to an earlier run."""
        found = {p: f for p, f in self.files.items() if f["state"] == COMMITTED}
        return {p: Upload(p, Path(), f["size"], f["sha256"]) for p, f in found.items()}


@dataclass
class Publisher:
    """Takes whole files one after the other and brings them to the hub in batches.

    delete: remove a local file once its commit is on the hub (never the small ones).
    """

    remote: Remote
    ledger: Ledger
    delete: bool = False
    progress: Callable[[Upload], None] = lambda file: None

    def __post_init__(self) -> None:
        self._batch: list[Upload] = []
        self._listing: Listing | None = None
        self.commits = 0

    @property
    def listing(self) -> Listing:
        """The branch's files, listed once a commit."""
        if self._listing is None:
            self._listing = self.remote.listing()
        return self._listing

    def look_again(self) -> None:
        """Somebody else commits to the branch as well: list it anew before the next commit."""
        self._listing = None

    @property
    def waiting(self) -> int:
        """Files that wait for their commit."""
        return len(self._batch)

    def add(self, file: Upload) -> None:
        """Upload one file unless the hub has it at its place, and commit when a batch is full."""
        if not self._is_there(file):
            if not is_inline(file):
                self.remote.upload(file)
            self.ledger.mark([file], "uploaded")
            self._batch.append(file)
        else:
            self._done([file])
        self.progress(file)
        waiting = sum(f.size for f in self._batch)
        if len(self._batch) >= BATCH_FILES or (self.delete and waiting >= BATCH_BYTES):
            self.flush("Add model files")

    def flush(self, message: str) -> None:
        """Commit what was uploaded. A commit whose answer is lost is looked for before it is made again."""
        for attempt in range(self.remote.client.retry.attempts + 1):
            self._batch = self._missing()
            if not self._batch:
                return
            try:
                self.remote.commit(self._batch, message, self.listing)
                self.commits += 1
                self._done(self._batch)
                self._batch, self._listing = [], None
                return
            except Conflict as conflict:
                log.warning("%s: commit: %s, looking whether it was made", self.remote.spec, conflict)
                self._listing = None
                if attempt == self.remote.client.retry.attempts:
                    raise TransferError(f"{self.remote.spec}: {conflict}; run the command again to continue") from None
                for file in self._missing():
                    if not is_inline(file):
                        self.remote.upload(file)

    def _missing(self) -> list[Upload]:
        there = [f for f in self._batch if self._is_there(f)]
        self._done(there)
        return [f for f in self._batch if f not in there]

    def _done(self, files: Sequence[Upload]) -> None:
        if not files:
            return
        self.ledger.mark(files, COMMITTED)
        for file in files:
            if self.delete and not is_inline(file) and file.path.endswith((".safetensors", ".gguf")):
                file.local.unlink(missing_ok=True)

    def _is_there(self, file: Upload) -> bool:
        found = self.listing.files.get(file.path)
        return found is not None and matches(found, file)


def matches(found: RepoFile, file: Upload) -> bool:
    """Whether the hub's file is this one; files without a SHA-256 in the listing are small and compared by git's."""
    if found.size != file.size:
        return False
    if found.sha256 is not None:
        return found.sha256 == file.sha256
    return found.git is not None and file.local.is_file() and digest_matches(file.local.read_bytes(), found)


def start(remote: Remote, ledger: Ledger, private: bool, request: bool) -> Remote:
    """Make sure that the repository exists; with `request`, go on in the pull request that the ledger knows of."""
    remote.create(private)
    if not request:
        return remote
    if ledger.request is None:
        ledger.request = remote.open_request("Add quantized files (mmquant)")
        ledger.save()
    return HUBS[remote.spec.hub].repository(remote.client, replace(remote.spec, revision=ledger.request))


def push_files(publisher: Publisher, weights: Sequence[Upload], last: Sequence[Upload]) -> None:
    """Weights first, the largest ones ahead; small files, manifest and card in the last commit.

    Raises TransferError when the hub's listing does not show every file afterwards.
    """
    for file in sorted(weights, key=lambda f: (-f.size, f.path)):
        publisher.add(file)
    if publisher.waiting + len(last) > BATCH_FILES:
        publisher.flush("Add model files")
    for file in last:
        publisher.add(file)
    publisher.flush("Add card, manifest and sums")
    listing = publisher.remote.listing()
    missing = [f.path for f in [*weights, *last] if not _shown(listing, f)]
    if missing:
        raise TransferError(f"{publisher.remote.spec}: {missing[0]} is not listed as it was sent; run again")


def _shown(listing: Listing, file: Upload) -> bool:
    found = listing.files.get(file.path)
    return found is not None and (matches(found, file) or (not file.local.is_file() and found.sha256 is None))
