"""Fetch one file from a hub in parallel ranges: resumable after kill -9, named only after its SHA-256 matches.

NAME.part holds the bytes at their places; NAME.part.json says which blocks are safely on disk (fsync first, then the
record). Both belong to one digest: a file that changed on the hub cannot be spliced onto the remains of another.
huggingface_hub >= 1.18 restarts files in every process and trusts their size; hence this one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_all
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import requests

from ..files.atomic import replace_whole, sha256_file, sync_file, sync_folder, write_whole
from ..files.parse import parse_json
from .body import BrokenBodyError, body
from .http import NETWORK_ERRORS, TRANSIENT, Client, TransferError, content_length, explain, origin, reason, retry_after
from .listing import RepoFile
from .options import BLOCK

CORRUPT_TRIES = 2
_SEEKING = threading.Lock()


class RangeIgnoredError(Exception):
    """The server answered a range with the whole file: never spliced, the file is read in one stream instead."""


@dataclass(frozen=True)
class Job:
    """One file to fetch: where it comes from, where it goes, who is told about bytes."""

    url: str
    file: RepoFile
    target: Path
    what: str
    block: int = BLOCK
    progress: Callable[[int], None] = lambda count: None

    @property
    def part(self) -> Path:
        """The file that is being filled."""
        return self.target.with_name(self.target.name + ".part")

    @property
    def record(self) -> Path:
        """Which blocks of it are there."""
        return self.target.with_name(self.target.name + ".part.json")

    @property
    def identity(self) -> dict[str, object]:
        """What a record must say to be continued."""
        return {"size": self.file.size, "digest": self.file.digest, "block": self.block}

    def blocks(self) -> list[tuple[int, int]]:
        """(first, last) byte of every block."""
        size = self.file.size
        return [(a, min(a + self.block, size) - 1) for a in range(0, size, self.block)]


def fetch(client: Client, job: Job, pool: Executor) -> Path:
    """Fetch a file whole and verified to job.target, continuing what an earlier process began.

    Raises HubError (access, gone), TransferError (network, wrong bytes after a second try), OSError (disk).
    """
    job.target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(CORRUPT_TRIES):
        done = _begin(job)
        try:
            _fetch_blocks(client, job, done, pool)
        except RangeIgnoredError:
            _fetch_stream(client, job)
        found = part_digest(job.part, job.file)
        if found == job.file.digest:
            replace_whole(job.part, job.target)
            job.record.unlink(missing_ok=True)
            return job.target
        job.record.unlink(missing_ok=True)
        job.part.unlink(missing_ok=True)
        job.progress(-job.file.size)
        if attempt + 1 == CORRUPT_TRIES:
            wanted = job.file.digest
            raise TransferError(f"{job.what}: the bytes hash to {found}, the listing says {wanted}; nothing is kept")
    raise AssertionError("unreachable")


def part_digest(path: Path, file: RepoFile) -> str:
    """The digest of a local file in the kind that the listing has: SHA-256, or git's blob SHA-1."""
    if file.sha256 is not None:
        return sha256_file(path)
    with open(path, "rb") as source:
        return hashlib.file_digest(source, lambda: hashlib.sha1(b"blob %d\0" % file.size)).hexdigest()


def need_disk(folder: Path, needed: int, what: str) -> None:
    """OSError (ENOSPC) unless `folder`'s disk has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        text = f"{what}: {needed:,} bytes are needed in {folder}, the disk has {free:,} free"
        raise OSError(errno.ENOSPC, text)


def on_disk(path: Path) -> int:
    """Bytes that a file with holes takes on the disk; where the system does not say (Windows), none are counted."""
    return getattr(path.stat(), "st_blocks", 0) * 512 if path.is_file() else 0


def _begin(job: Job) -> set[int]:
    """Blocks that are already on disk; a fresh .part when there are none, or others'."""
    done: set[int] = set()
    try:
        record = parse_json(job.record.read_bytes(), str(job.record))
        if job.part.stat().st_size == job.file.size and {k: record.get(k) for k in job.identity} == job.identity:
            done = {int(i) for i in record["done"] if 0 <= int(i) < len(job.blocks())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        done = set()
    left = sum(b - a + 1 for i, (a, b) in enumerate(job.blocks()) if i not in done)
    used = on_disk(job.part)
    need_disk(job.part.parent, max(0, min(left, job.file.size - used)), job.what)
    if not done:
        job.record.unlink(missing_ok=True)
        with open(job.part, "wb") as file:
            file.truncate(job.file.size)
        sync_folder(job.part.parent)
    job.progress(job.file.size - left)
    return done


def _fetch_blocks(client: Client, job: Job, done: set[int], pool: Executor) -> None:
    """All missing blocks, in parallel; each is fsynced and then recorded."""
    located = Located(client, job)
    lock = threading.Lock()
    stop = threading.Event()
    part = open(job.part, "rb+", buffering=0)

    def one(index: int) -> None:
        if stop.is_set():
            return
        try:
            _fetch_block(client, located, job, part, *job.blocks()[index], stop)
            if stop.is_set():
                return
            sync_file(part)
            with lock:
                done.add(index)
                _record(job, done)
        except BaseException:
            stop.set()
            raise

    futures: list[Future[None]] = []
    try:
        for index in [i for i in range(len(job.blocks())) if i not in done]:
            futures.append(_submit(pool, one, index, job))
        wait_all(futures)
        for future in futures:
            future.result()
    except CancelledError:
        raise TransferError(f"{job.what}: cancelled") from None
    except OSError as error:
        raise _disk_error(error, job) from None
    finally:
        stop.set()
        wait_all(futures)  # none may write to a file that is closed already
        part.close()


def _submit(pool: Executor, work: Callable[[int], None], index: int, job: Job) -> Future[None]:
    try:
        return pool.submit(work, index)
    except RuntimeError:  # the pool was shut down
        raise TransferError(f"{job.what}: cancelled") from None


def _record(job: Job, done: set[int]) -> None:
    """Note the blocks that are safely on disk. No fsync: a lost or torn note costs blocks, never truth."""
    write_whole(job.record, json.dumps({**job.identity, "done": sorted(done)}).encode(), durable=False)


def _disk_error(error: OSError, job: Job) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{job.what}: the disk of {job.target.parent} is full, {job.file.size:,} bytes are needed for this file"
        return OSError(error.errno, text)
    return error


class Located:
    """Where a file's bytes really are: the address behind the hub's redirect, asked for again when it expires.

    Asking the hub for every range would use up its limit on such requests (3,000 in 5 minutes without login).
    """

    def __init__(self, client: Client, job: Job) -> None:
        self.client, self.job = client, job
        self.lock = threading.Lock()
        self.address: str | None = None

    def open(self, headers: dict[str, str]) -> requests.Response:
        """One attempt at a ranged request; refusals by a remembered address send the next attempt back to the hub."""
        address = self.address
        response = self.client.once("GET", address or self.job.url, headers)
        with self.lock:
            if response.status_code == 206 and response.url != self.job.url:
                self.address = response.url
            elif self.refused_by_storage(response):
                self.address = None
        return response

    def refused_by_storage(self, response: requests.Response) -> bool:
        """Whether the host behind the hub refuses: its signed addresses expire, the hub makes new ones."""
        away = origin(response.url) != origin(self.client.endpoint.url)
        return away and response.status_code in (400, 401, 403, 404, 410)


def _fetch_block(
    client: Client, located: Located, job: Job, part: FileIO, first: int, last: int, stop: threading.Event
) -> None:
    """One block into place. A broken connection goes on where it broke; attempts count only without progress."""
    at, attempt = first, 0
    while at <= last and not stop.is_set():
        start, trouble, asked = at, "", None
        try:
            response = located.open({"Range": f"bytes={at}-{last}"})
            if response.status_code in TRANSIENT or located.refused_by_storage(response):
                trouble, asked = f"HTTP {response.status_code}", retry_after(response.headers)
                response.close()
            else:
                _check_range(client, job, response, at, last)
                for piece in body(client, response, last - at + 1):
                    _write_at(part, piece, at)
                    at += len(piece)
                    job.progress(len(piece))
        except (*NETWORK_ERRORS, BrokenBodyError) as error:
            trouble = reason(error)
        if at <= last:
            attempt = 0 if at > start else attempt + 1
            if attempt > client.retry.attempts:
                raise TransferError(f"{job.what}: {trouble}, {attempt} attempts; run the command again to continue")
            client.pause(max(attempt - 1, 0), asked)


def _write_at(part: FileIO, piece: bytes, at: int) -> None:
    """Write into an unbuffered file; several threads do so, each at its own place."""
    if hasattr(os, "pwrite"):
        while piece:
            written = os.pwrite(part.fileno(), piece, at)
            piece, at = piece[written:], at + written
        return
    with _SEEKING:  # Windows: a file has one position
        part.seek(at)
        while piece:
            piece = piece[part.write(piece) :]


def _check_range(client: Client, job: Job, response: requests.Response, first: int, last: int) -> None:
    """Only the exact range may be written."""
    if response.status_code == 200:
        response.close()
        raise RangeIgnoredError
    if response.status_code != 206:
        raise explain(response, client.endpoint, job.what)
    expected = f"bytes {first}-{last}/{job.file.size}"
    found = response.headers.get("Content-Range", "").strip()
    if found != expected:
        response.close()
        raise TransferError(f"{job.what}: the server sends {found!r}, expected {expected!r}; nothing of it is kept")


def _fetch_stream(client: Client, job: Job) -> None:
    """The whole file in one unranged stream, for a server that ignores Range; begins at zero after every break."""
    job.record.unlink(missing_ok=True)
    trouble = ""
    for attempt in range(client.retry.attempts + 1):
        try:
            response = client.send("GET", job.url, what=job.what)
            if response.status_code != 200:
                raise explain(response, client.endpoint, job.what)
            length = content_length(response.headers)
            if length not in (None, job.file.size):
                response.close()
                raise TransferError(
                    f"{job.what}: the server sends {length:,} bytes, the listing says {job.file.size:,}"
                )
            with open(job.part, "rb+") as target:
                for piece in body(client, response, job.file.size):
                    target.write(piece)
                sync_file(target)
            return
        except (*NETWORK_ERRORS, BrokenBodyError) as error:
            trouble = reason(error)
        except OSError as error:
            raise _disk_error(error, job) from None
        if attempt < client.retry.attempts:
            client.pause(attempt)
    raise TransferError(f"{job.what}: {trouble}, and the server ignores Range: the file cannot be continued")
