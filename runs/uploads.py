"""Publish weight files while later layers are made: whole shards and parts leave, index, card and manifest come last.

One thread takes files from a short queue. Where they are deleted once they are committed, the run waits for it, so that
the disk holds a few files of an artifact and never all of it. What a ledger says is committed is not looked for again.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmquant.errors import InputError, naming
from mmquant.monitor import Bar, current

from ..convert.hub.layout import check_layout, remote_path
from ..convert.hub.ledger import COMMITTED, sent
from ..convert.licence import LICENSE_FILES

if TYPE_CHECKING:
    from ..convert.hub.push import Publisher
    from .recipe.read import Push, Recipe
    from .run_check import Alongside

FILES = 3  # the largest files of an artifact that its disk holds at once: one grows, one is new, one is on its way
COMMIT_BYTES = 20 * 10**9  # that wait for a commit; hubs take about a hundred commits an hour


class Piecewise(Protocol):
    """An artifact whose weight files become whole one by one."""

    out: Path
    steps: int
    room: int | None

    @property
    def bytes(self) -> int:
        """Of all."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every weight file when it is whole."""
        ...

    @property
    def quant_label(self) -> str:
        """What names of GGUF files end with."""
        ...

    def whole(self) -> dict[str, int]:
        """Files that are whole and durable, and the step that filled each."""
        ...

    def sha256(self, name: str) -> str:
        """Of a whole file."""
        ...

    def small_files(self) -> dict[str, bytes]:
        """What will lie beside them."""
        ...

    def check(self, layers: Sequence[int]) -> None:
        """Read these layers back; what lies in files that are gone is left out. InputError for the first fault."""
        ...


class LostError(Exception):
    """A check begins anew and needs what was published and deleted; names: those artifacts."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class Uploads:
    """The artifacts of a run that leave while they are made. orders: by artifact, its repositories."""

    def __init__(
        self,
        jobs: Mapping[str, Piecewise],
        orders: Mapping[str, Sequence[Push]],
        deleted: frozenset[str],
        log: Callable[..., None],
    ) -> None:
        """deleted: artifacts whose files go once they are committed everywhere; log: takes an event and its facts."""
        self.jobs, self.orders, self.deleted, self.log = jobs, orders, deleted, log
        self._ways: dict[str, list[Publisher]] = {}
        self._labels = {name: [job.quant_label] for name, job in jobs.items()}
        self._checked = dict.fromkeys(jobs, 0)  # layers
        self._seen: set[tuple[str, str]] = set()
        self._queue: deque[tuple[str, str]] = deque()
        self._pending: dict[tuple[str, str], int] = {}
        self._turn, self._thread = threading.Condition(), None
        self._stop = self._urgent = self._abort = False
        self._error: BaseException | None = None
        self._bar: Bar | None = None
        for name in deleted & jobs.keys():
            jobs[name].room = room_of(jobs[name])

    def begin(self) -> None:
        """Refuse what a hub or its clients would not take, then make the repositories. Jobs are open."""
        for name, job in self.jobs.items():
            with naming(name):
                small = job.small_files()
                if not any(small.get(file, b"").strip() for file in LICENSE_FILES):
                    raise InputError("no licence file in the source, without it nothing is published")
                sizes = {**job.sizes, **{file: len(data) for file, data in small.items()}}
                labels = self._labels[name]
                check_layout({remote_path(file, labels): size for file, size in sizes.items()}, labels)
        for name in self.jobs:
            self._ways[name] = [self._publisher(name, order) for order in self.orders[name]]
        context = contextvars.copy_context()
        self._bar = current().start("upload", sum(sum(job.sizes.values()) for job in self.jobs.values()), "B")
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="uploads", daemon=True)
        self._thread.start()

    def _publisher(self, name: str, order: Push) -> Publisher:
        from ..convert.hub.http import Client
        from ..convert.hub.hubs import endpoint_of, remote_of
        from ..convert.hub.push import Ledger, Publisher, start

        options = order.options
        remote = remote_of(Client(endpoint_of(options.hub)), order.repo, options.revision)
        ledger = Ledger(self.jobs[name].out, remote)
        remote = start(remote, ledger, options.private, options.pr)
        return Publisher(remote, ledger)

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def guard(self, layer: int) -> None:
        """A check will read `layer` and what follows: LostError when files are gone that it needs. Jobs are open."""
        found: list[str] = []
        for name, job in self.jobs.items():
            away, whole = sent(job.out) & job.sizes.keys(), job.whole()
            if away and (not layer or any(whole.get(file, 0) > layer for file in away)):
                found.append(name)
        if found:
            raise LostError(found)

    def after(self, step: int) -> None:
        """Every artifact has the step: what is whole and not needed here any more may leave."""
        self._raise()
        for name, job in self.jobs.items():
            layers = range(self._checked[name], min(step, job.steps - 2))
            whole = job.whole()
            new = [file for file, last in whole.items() if last <= step and last < job.steps - 1 and step]
            new = [file for file in new if (name, file) not in self._seen and (job.out / file).is_file()]
            with naming(name):
                job.check(layers)
            self._checked[name] = max(self._checked[name], layers.stop)
            with self._turn:
                self._seen |= {(name, file) for file in new}
                self._queue += [(name, file) for file in new]
                self._pending |= {(name, file): job.sizes[file] for file in new}
                self._turn.notify_all()
        self._wait()

    def _wait(self) -> None:
        """Until the disk has room again: what is to be deleted waits no longer than one file."""
        kept = max((max(self.jobs[name].sizes.values()) for name in self.deleted & self.jobs.keys()), default=0)
        with self._turn:
            while self._error is None and self._waiting() > kept:
                self._urgent = True
                self._turn.notify_all()
                self._turn.wait()
            self._urgent = False
        self._raise()

    def _waiting(self) -> int:
        return sum(size for (name, _), size in self._pending.items() if name in self.deleted)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self, failed: BaseException | None = None) -> None:
        """Bring what waits to its repositories, or after a failure stop as soon as may be."""
        if self._thread is None:
            return
        with self._turn:
            self._stop, self._abort = True, failed is not None
            self._turn.notify_all()
        if failed is None or isinstance(failed, Exception):  # a signal does not wait for 5 GB
            self._thread.join()
        if self._bar is not None:
            self._bar.finish()
        if failed is None:
            self._raise()

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (found := self._next()) is not None:
                self._send(*found) if found else self._flush()
                self._settle()
        except BaseException as error:  # the run's own thread raises it
            with self._turn:
                self._error = error
                self._turn.notify_all()

    def _next(self) -> tuple[str, str] | tuple[()] | None:
        """A file to send, () to commit what was sent, None when all is done."""
        with self._turn:
            while True:
                if self._abort:
                    return None
                if self._queue:
                    return self._queue.popleft()
                waiting = sum(self._pending.values())
                if waiting and (self._urgent or self._stop or waiting >= COMMIT_BYTES):
                    return ()
                if self._stop:
                    return None
                self._turn.wait()

    def _send(self, name: str, file: str) -> None:
        if (name, file) not in self._pending:  # an earlier run had committed it
            return
        job = self.jobs[name]
        for publisher in self._ways[name]:
            path = remote_path(file, self._labels[name])
            publisher.add(publisher.ledger.upload(path, job.out / file, job.sha256(file)))

    def _flush(self) -> None:
        for publisher in (publisher for ways in self._ways.values() for publisher in ways):
            publisher.look_again()  # another artifact's files may have been committed to the same branch
            publisher.flush("Add model files")

    def _settle(self) -> None:
        """Files that are committed everywhere: deleted where that was asked for, and no longer waited for."""
        for name, file in list(self._pending):
            path = remote_path(file, self._labels[name])
            states = [publisher.ledger.files.get(path, {}).get("state") for publisher in self._ways[name]]
            if any(state != COMMITTED for state in states):
                continue
            if name in self.deleted:
                (self.jobs[name].out / file).unlink(missing_ok=True)
            self.log("uploaded", name=name, file=file)
            with self._turn:
                size = self._pending.pop((name, file))
                self._turn.notify_all()
            if self._bar is not None:
                self._bar.advance(size)


def room_of(job: Piecewise) -> int:
    """Bytes that the disk holds of an artifact whose files leave as they become whole."""
    largest = max(job.sizes.values())
    step = -(-2 * job.bytes // max(1, job.steps - 2))  # a layer is less than twice its share
    return min(job.bytes, FILES * largest + step)


def deletes_early(recipe: Recipe, name: str) -> bool:
    """Whether an artifact's files are deleted while later layers are made: it leaves early to all of its places."""
    orders = [order for order in recipe.push if name in order.variants]
    return bool(orders) and all(order.as_completed for order in orders) and deletes(orders)


def deletes(orders: Sequence[Push]) -> bool:
    """Whether an artifact goes once it is in all of its repositories."""
    return any(order.options.delete_after_upload for order in orders)


def where_of(order: Push) -> str:
    """A repository, in the journal."""
    return f"{order.options.hub}:{order.repo}"


class Hooks:
    """What happens around the steps of all artifacts: the check reads them, then what is whole may leave."""

    def __init__(self, check: Alongside | None, uploads: Uploads) -> None:
        self.check, self.uploads = check, uploads

    def before(self, first: int) -> None:
        """Artifacts are open; `first` is their first step that is missing."""
        if self.check is not None:
            self.check.before(first)
        if self.uploads.jobs:
            self.uploads.begin()

    def after(self, step: int) -> None:
        """Every artifact has the step."""
        if self.check is not None:
            self.check.after(step)
        self.uploads.after(step)
