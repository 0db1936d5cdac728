"""A checkpoint on a hub as a ShardStore: headers by ranges, shards fetched before and deleted after use."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from mmquant.errors import InputError
from mmquant.monitor import current
from mmquant.stages import stage

from ..checkpoints.store import Origin, TensorInfo, header_length, parse_header, shard_names
from ..files.atomic import write_whole
from ..files.kinds import refuse_strangers
from ..files.lfs import refuse_pointer
from ..files.lock import hold
from ..files.parse import SMALL_LIMIT
from .body import fetch_range
from .cache import cached, candidates
from .fetch import Job, fetch, need_disk
from .http import Client, TransferError
from .hubs import HUBS, endpoint_of, file_url, parse_spec
from .listing import Listing, RepoFile, digest_matches
from .pin import FetchOptions, default_work, pinned_listing
from .prefetch import DaemonPool, Prefetcher

HEADER_GUESS = 128 << 10
HEADER_READERS = 8
RANGE_KEPT = 32 << 10  # bytes of a shard that are kept when they were asked for alone


def hub_source(spec: str, options: FetchOptions | None = None) -> HubFolder:
    """Open hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV]: the revision is resolved and the commit listed, nothing is fetched.

    Raises ValueError for a malformed spec, unknown repository or revision, or missing access; OSError for the network.
    """
    options = options or FetchOptions()
    parsed = parse_spec(spec)
    client = Client(endpoint_of(parsed.hub), options.retry)
    listing = pinned_listing(client, parsed, options)
    return HubFolder(client, listing, options)


class HubFolder:
    """One commit of a repository. Shards lie under `folder` while they are used; small files and headers stay."""

    def __init__(self, client: Client, listing: Listing, options: FetchOptions) -> None:
        self.listing, self.options = listing, options
        self.hub, self.repo, self.revision = listing.spec.hub, listing.spec.repo, listing.commit
        self.label, self.is_local = str(listing.pinned), False
        self.origin = Origin(self.hub, self.repo, self.revision)
        name = f"{self.hub}--{self.repo.replace('/', '--')}--{self.revision[:16]}"
        self.folder = (options.work or default_work()) / name
        self.client = client
        self._pool = DaemonPool(options.connections)
        self._lock = threading.Lock()
        self._held: ExitStack | None = None
        self._tidied = False
        self._headers: dict[str, list[TensorInfo]] | None = None
        self._from_cache: dict[str, Path] = {}
        self.bar = current().start("fetch", None, "B")
        limits = options.max_disk, options.max_shards, options.keep_shards
        self._prefetch = Prefetcher(self._obtain, self.files(), *limits)

    # -- the protocol ----------------------------------------------------------------------------------------------

    def files(self) -> dict[str, int]:
        """Path -> bytes of every file."""
        return {f.path: f.size for f in self.listing.files.values()}

    def small(self, name: str) -> bytes | None:
        """Bytes of a small file, None when there is none."""
        file = self.listing.files.get(name)
        if file is None:
            return None
        if file.size > SMALL_LIMIT:
            raise InputError(f"{self.label}: {name} has {file.size:,} bytes, expected a small file")
        return refuse_pointer(f"{self.label}: {name}", self._kept("small", file, lambda: self._get(file)))

    def header(self, shard: str) -> list[TensorInfo]:
        """The tensors of a shard. InputError for a damaged header."""
        with self._lock:
            if self._headers is None:
                self._headers = self._all_headers()
        if shard not in self._headers:
            raise InputError(f"{self.label}: {shard} is not among the shards of the index")
        return self._headers[shard]

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard, from the local copy or by a ranged request."""
        file = self._file(shard)
        if offset + size > file.size:
            raise InputError(f"{self.label}: {shard}: {file.size:,} bytes, {size:,} at {offset:,} were asked for")
        local = self._local(file)
        if local is None and self.client.endpoint.offline:
            local = self._unverified(file)
        if local is None:

            def ask() -> bytes:
                return self.ranged(file, offset, size)

            # The vectors that tell checkpoints apart are asked for by every command.
            return self._kept(f"ranges/{offset}", file, ask, size) if 0 < size <= RANGE_KEPT else ask()
        with open(local, "rb") as source:
            source.seek(offset)
            return source.read(size)

    def is_here(self, path: str) -> bool:
        """Whether a whole copy of a file is on this machine, as far as its size tells."""
        file = self._file(path)
        return self._local(file) is not None or self._unverified(file) is not None

    def ranged(self, file: RepoFile, offset: int, size: int) -> bytes:
        """Bytes of a file by a request of their own; nothing of them is kept or verified."""
        return fetch_range(self.client, self._url(file.path), offset, size, file.size, f"{self.label} {file.path}")

    def path(self, shard: str) -> Path:
        """The local file of a shard, fetched when it is not there."""
        self._file(shard)
        self.hold()
        with stage("fetch"):
            return self._prefetch.path(shard)

    def plan(self, shards: list[str]) -> None:
        """Fetch shards ahead in this order. InputError when the largest does not fit the disk limit."""
        sizes = {s: self._file(s).size for s in shards}
        largest = max(sizes, key=lambda s: sizes[s], default=None)
        limit = self.options.max_disk
        if largest and limit is not None and sizes[largest] > limit and not self.options.keep_shards:
            raise InputError(f"--max-disk {limit:,}: shard {largest} alone has {sizes[largest]:,} bytes")
        self.hold()
        if self.options.keep_shards:
            missing = sum(s for n, s in sizes.items() if self._local(self.listing.files[n]) is None)
            need_disk(self.folder, missing, f"{self.label} with --keep-shards")
        self.bar.expect(sum(sizes.values()))
        if not self._tidied:
            self._tidy(shards)
            self._tidied = True
        self._prefetch.plan(shards)

    def release(self, shard: str) -> None:
        """A shard is not needed again; delete it unless --keep-shards."""
        self._prefetch.release(shard)

    def in_flight(self) -> int:
        """Most bytes that shards will still take on the work folder's disk at once."""
        here = {p: self._target(f) for p, f in self.listing.files.items() if p.endswith(".safetensors")}
        sizes = sorted((self.listing.files[p].size for p in here), reverse=True)
        limit = sum(sizes if self.options.keep_shards else sizes[: self.options.max_shards])
        if self.options.max_disk is not None and not self.options.keep_shards:
            limit = min(limit, self.options.max_disk)
        present = sum(self.listing.files[p].size for p, path in here.items() if path.is_file())
        return max(0, limit - present)

    def close(self, finished: bool = False) -> None:
        """Stop fetching and let go of the folder; what is there is taken up by the next run.

        `finished`: it goes, the work folder too, unless shards are to be kept.
        """
        if finished:
            self._prefetch.release_all()
        self.client.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.bar.finish()
        if self._held:
            self._held.close()
        if finished and self.options.work is not None and not self.options.keep_shards:
            shutil.rmtree(self.options.work, ignore_errors=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> RepoFile:
        if name not in self.listing.files:
            raise InputError(f"{self.label}: {name} is not in the repository")
        return self.listing.files[name]

    def _url(self, name: str) -> str:
        return file_url(self.client.endpoint.url, self.listing.pinned, name)

    def hold(self) -> None:
        """Own the folder from the first shard on; ValueError naming the process that has it."""
        with self._lock:
            if self._held is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack = ExitStack()
                stack.enter_context(hold(self.folder))
                self._held = stack

    def _get(self, file: RepoFile) -> bytes:
        found = cached(self.listing.spec, file)
        data = found.read_bytes() if found else b""
        for _ in range(2):
            if digest_matches(data, file):
                return data
            data, _ = self.client.get(self._url(file.path), what=f"{self.label} {file.path}", limit=file.size)
        if not digest_matches(data, file):
            raise TransferError(
                f"{self.label} {file.path}: {len(data):,} bytes that are not those of the listing, twice"
            )
        return data

    def _kept(self, kind: str, file: RepoFile, make: Callable[[], bytes], size: int | None = None) -> bytes:
        """Bytes kept in the work folder under the file's digest; size: how many they are, where that is known."""
        kept = self.folder / kind / file.digest
        if kept.is_file() and (kept.stat().st_size <= file.size if size is None else kept.stat().st_size == size):
            return kept.read_bytes()
        data = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, data, shared=True)
        return data

    def _all_headers(self) -> dict[str, list[TensorInfo]]:
        """Headers of every shard, a few at a time; before the first shard is fetched."""
        names = shard_names(self)

        def one(name: str) -> list[TensorInfo]:
            file = self.listing.files[name]
            return parse_header(self._kept("headers", file, lambda: self._sound_header(file)), name, file.size)

        with ThreadPoolExecutor(HEADER_READERS) as pool:
            return dict(zip(names, pool.map(one, names), strict=True))

    def _sound_header(self, file: RepoFile) -> bytes:
        """The header, parsed before anything of it is stored."""
        data = self._header(file)
        parse_header(data, file.path, file.size)
        return data

    def _header(self, file: RepoFile) -> bytes:
        """The JSON of a shard's header, in one request when it is short."""
        if local := self._unverified(file):
            with open(local, "rb") as source:
                return source.read(header_length(source.read(8), file.path, file.size))
        first = self.read(file.path, 0, min(HEADER_GUESS, file.size))
        refuse_strangers(first, f"{self.label} {file.path}", "a safetensors file")
        length = header_length(first[:8], file.path, file.size)
        if length + 8 > len(first):
            first += self.read(file.path, len(first), length + 8 - len(first))
        return first[8 : length + 8]

    def _target(self, file: RepoFile) -> Path:
        return self.folder / "shards" / file.path

    def _local(self, file: RepoFile) -> Path | None:
        """A whole copy that is here: our own (verified when it got its name), or one found in a hub's cache."""
        target = self._target(file)
        if target.is_file() and target.stat().st_size == file.size:
            return target
        return self._from_cache.get(file.path)

    def _unverified(self, file: RepoFile) -> Path | None:
        """A hub's cached copy of the right size: good for its header, which is compared when the shard is used."""
        return next(
            (p for p in candidates(self.listing.spec, file) if p.is_file() and p.stat().st_size == file.size), None
        )

    def _obtain(self, name: str) -> tuple[Path, bool]:
        """A verified local shard, and whether it is ours to delete."""
        file, what = self._file(name), f"{self.label} {name}"
        local = self._local(file)
        if local is None and (found := cached(self.listing.spec, file)):
            local = self._from_cache[name] = found
        if local is not None:
            self._check_header(file, local)
            self.bar.advance(file.size)
            return local, local == self._target(file)
        target = self._target(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        transport = HUBS[self.hub].transports.get(self.options.transport)
        if transport is not None:
            need_disk(target.parent, file.size, what)
            if transport(self.client, self.listing.pinned, file, target, self.options.retry.stall):
                self._check_header(file, target)
                return target, True
        job = Job(self._url(name), file, target, what, self.options.block, self._count)
        fetch(self.client, job, self._pool)
        self._check_header(file, target)
        return target, True

    def _tidy(self, order: list[str]) -> None:
        """Count what an earlier run left towards the limits, and delete what this one will not use."""
        kept: set[Path] = set()
        for name in order:
            target = self._target(self.listing.files[name])
            if target.is_file() and target.stat().st_size == self.listing.files[name].size:
                if self._prefetch.adopt(name, target):
                    kept.add(target)
            elif len(kept) < 2:  # a half fetched shard is worth keeping when it is among the next ones
                kept |= {target.with_name(target.name + end) for end in (".part", ".part.json")}
        folder = self.folder / "shards"
        for path in folder.rglob("*") if folder.is_dir() and not self.options.keep_shards else list[Path]():
            if path.is_file() and path not in kept:
                path.unlink()

    def _count(self, count: int) -> None:
        self.bar.advance(count)

    def _check_header(self, file: RepoFile, path: Path) -> None:
        """The header that the plan was made from must be the verified file's own."""
        kept = self.folder / "headers" / file.digest
        if not file.path.endswith(".safetensors") or not kept.is_file():
            return
        header = kept.read_bytes()
        with open(path, "rb") as source:
            source.seek(8)
            if source.read(len(header)) != header:
                kept.unlink()
                raise TransferError(f"{self.label} {file.path}: its header differs from the one read before; run again")
