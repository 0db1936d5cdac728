"""Fetch shards ahead of use, in order, within a limit of bytes and files."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mmquant.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")

FETCHERS = 3  # shards in flight at once: the next one's ranges fill the gap at the end of the current one
SPARED = 3  # readers outside the plan open what they ask for at once: so many files are never deleted under them


class DaemonPool(Executor):
    """Threads that do not keep a failed or interrupted process alive; what they leave behind is safe to continue."""

    def __init__(self, workers: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """RuntimeError after shutdown, as every Executor has it: nobody would ever finish the future."""
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._queue.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # handed to whoever asks for the result
                future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finish what is queued, or cancel it, and end the threads."""
        with self._closing:
            if not self._closed:
                self._closed = True
                if cancel_futures:
                    self._cancel()
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads if wait else []:
            thread.join()

    def _cancel(self) -> None:
        with contextlib.suppress(queue.Empty):
            while item := self._queue.get_nowait():
                item[0].cancel()
                item[0].set_running_or_notify_cancel()


class Prefetcher:
    """Hands out local shards, and fetches the planned ones meanwhile.

    fetch(name) -> (path, ours): `ours` files are deleted on release unless `keep`. The disk that a shard takes counts
    from the moment its fetch begins until it is released.
    """

    def __init__(
        self,
        fetch: Callable[[str], tuple[Path, bool]],
        sizes: dict[str, int],
        max_disk: int | None,
        max_shards: int | None,
        keep: bool,
    ) -> None:
        self._fetch, self._sizes, self._keep = fetch, sizes, keep
        self._max_disk = None if keep else max_disk
        self._max_shards = None if keep else max_shards
        self._changed = threading.Condition()
        self._order: list[str] = []
        self._wanted: list[str] = []
        self._running: set[str] = set()
        self._ready: dict[str, tuple[Path, bool]] = {}
        self._failed: dict[str, BaseException] = {}
        self._used: dict[str, None] = {}  # handed out, not yet released; the longest unasked first

    def plan(self, order: list[str]) -> None:
        """Shards in the order of their coming use; replaces an earlier plan, whose unused shards go."""
        with self._changed:
            self._order = list(dict.fromkeys(order))
            for name in [n for n in self._ready if n not in self._used and n not in self._order]:
                self._drop(name)
            self._pump()

    def path(self, name: str) -> Path:
        """The local file, fetched now if need be.

        Raises what the fetch raised; ValueError when the limits leave no room for a shard that is needed now.
        """
        with self._changed:
            while name not in self._ready:
                if name in self._failed:
                    raise self._failed.pop(name)
                if name not in self._running:
                    if name not in self._wanted:
                        self._wanted.append(name)
                    self._pump()
                    if name not in self._running:
                        self._too_tight(name)
                self._changed.wait(1.0)
            self._used.pop(name, None)
            self._used[name] = None
            return self._ready[name][0]

    def release_all(self) -> None:
        """Nothing will be used any more."""
        with self._changed:
            self._order = []
            for name in list(self._ready):
                self._drop(name)

    def release(self, name: str) -> None:
        """The shard has been used for the last time."""
        with self._changed:
            self._used.pop(name, None)
            if name in self._order:
                self._order.remove(name)
            self._drop(name)
            self._pump()

    def adopt(self, name: str, path: Path) -> bool:
        """Count a whole shard of an earlier run, when the limits have room for it."""
        with self._changed:
            if self._fits(name):
                self._ready[name] = (path, True)
            return name in self._ready

    def _drop(self, name: str) -> None:
        if not self._keep and name in self._ready:
            path, ours = self._ready.pop(name)
            if ours:
                path.unlink(missing_ok=True)

    def _fits(self, name: str) -> bool:
        held = {*self._ready, *self._running}
        if self._max_shards is not None and len(held) + 1 > self._max_shards:
            return False
        return self._max_disk is None or sum(self._sizes[n] for n in held) + self._sizes[name] <= self._max_disk

    def _pump(self) -> None:
        """Start what can be started: what somebody waits for, then the plan in its order."""
        for name in [*self._wanted, *self._order]:
            if name in self._ready or name in self._running or name in self._failed:
                continue
            expected = name in self._wanted
            if len(self._running) >= FETCHERS and not expected:
                return
            while not self._fits(name):
                if not expected or not self._evict():
                    break
            if not self._fits(name):
                return
            self._running.add(name)
            threading.Thread(target=self._run, args=(name,), daemon=True).start()

    def _evict(self) -> bool:
        """Delete the shard that was fetched ahead and is needed last, else the unplanned one unasked for longest."""
        ahead = [n for n in self._ready if n not in self._used and n not in self._wanted]
        if self._keep:
            return False
        if ahead:
            self._drop(max(ahead, key=lambda n: self._order.index(n) if n in self._order else len(self._order)))
            return True
        unplanned = [n for n in self._used if n not in self._order]
        if len(unplanned) <= SPARED:
            return False
        del self._used[unplanned[0]]
        self._drop(unplanned[0])
        return True

    def _too_tight(self, name: str) -> None:
        """ValueError when nothing will make room for a shard that is needed now; else something can be waited for."""
        if self._running:
            return
        self._wanted.remove(name)
        held = {*self._ready} & {*self._used}
        needed = sum(self._sizes[n] for n in held) + self._sizes[name]
        limits = [("--max-shards", self._max_shards, len(held) + 1), ("--max-disk", self._max_disk, needed)]
        found = [f"{option} {limit:,}, expected at least {least:,}" for option, limit, least in limits if limit]
        raise InputError(f"{name}: needed beside {len(held)} shards in use: {'; '.join(found)}")

    def _run(self, name: str) -> None:
        result: tuple[Path, bool] | None = None
        failure: BaseException | None = None
        try:
            result = self._fetch(name)
        except BaseException as error:  # handed to whoever asks for the shard
            failure = error
        with self._changed:
            self._running.discard(name)
            if name in self._wanted:
                self._wanted.remove(name)
            if result is not None:
                self._ready[name] = result
            elif failure is not None:
                self._failed[name] = failure
            self._pump()
            self._changed.notify_all()
