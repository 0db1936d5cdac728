"""Where the time of a run goes: seconds by stage, of the thread that computes and of those that work behind it.

Code names what it does with `stage("read")`; nobody hears it unless a run has begun with `timing`. A stage inside
another counts for itself alone. An error carries the name of the innermost stage that it left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Stages:
    """Seconds by stage, added up by any thread until `take` hands them over.

    settle: waits for what a device still does, so that its time counts for the stage that began it.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle
        self._lock = threading.Lock()
        self._seconds: dict[bool, dict[str, float]] = {False: {}, True: {}}

    def add(self, name: str, seconds: float, behind: bool) -> None:
        """So many more seconds of a stage."""
        with self._lock:
            found = self._seconds[behind]
            found[name] = found.get(name, 0.0) + seconds

    def take(self, behind: bool = False) -> dict[str, float]:
        """What was added since the last call; `behind`: by threads that work behind the one that computes."""
        with self._lock:
            found, self._seconds[behind] = self._seconds[behind], {}
        return {name: round(seconds, 3) for name, seconds in found.items()}


_MARK = "mmquant_stage"
_STAGES: ContextVar[Stages | None] = ContextVar("mmquant.stages", default=None)
_BEHIND: ContextVar[bool] = ContextVar("mmquant.stages.behind", default=False)
_INNER: ContextVar[list[float] | None] = ContextVar("mmquant.stages.inner", default=None)


@contextmanager
def timing(stages: Stages) -> Iterator[None]:
    """Add up the stages of what runs inside."""
    token = _STAGES.set(stages)
    try:
        yield
    finally:
        _STAGES.reset(token)


@contextmanager
def behind() -> Iterator[None]:
    """What runs inside works behind the thread that computes."""
    marks = _BEHIND.set(True), _INNER.set(None)
    try:
        yield
    finally:
        _BEHIND.reset(marks[0])
        _INNER.reset(marks[1])


@contextmanager
def stage(name: str) -> Iterator[None]:
    """The time inside, but that of further stages, counts for `name`."""
    stages, outer = _STAGES.get(), _INNER.get()
    if stages is None:
        with _telling(name):
            yield
        return
    after = _BEHIND.get()
    if not after:
        stages.settle()
    inner, began = [0.0], time.perf_counter()
    token = _INNER.set(inner)
    try:
        with _telling(name):
            yield
    finally:
        _INNER.reset(token)
        if not after:
            stages.settle()
        whole = time.perf_counter() - began
        stages.add(name, whole - inner[0], after)
        if outer is not None:
            outer[0] += whole


@contextmanager
def _telling(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.__dict__.setdefault(_MARK, name)
        raise


def stage_of(error: BaseException) -> str | None:
    """The stage in which an error arose, as far as one was named."""
    return error.__dict__.get(_MARK)
