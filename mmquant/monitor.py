"""The monitor of a run: one object gets progress and messages; by default nobody does.

A run asks for `current()` and tells it what it does. The command line watches with the terminal's monitor
(commands/terminal.py); a caller of the Python API hands its own to `watching`, or to a function's `monitor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Bar(Protocol):
    """One phase of a run on its way. One that also has `tell(note)` hears what the phase does now."""

    def advance(self, count: int = 1) -> None:
        """So many more units are done."""
        ...

    def expect(self, total: int) -> None:
        """How many units there are in all, where that became known later."""
        ...

    def finish(self) -> None:
        """The phase has ended, whole or not. Safe to call twice."""
        ...


class Monitor(Protocol):
    """What a run reports to. Calls may come from several threads; none of them may raise."""

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """A phase begins: `total` units (None: not known yet), `done` of them by an earlier run."""
        ...

    def message(self, text: str) -> None:
        """One line that a user should read."""
        ...


class SilentBar:
    """Shows nothing."""

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        del count

    def expect(self, total: int) -> None:
        """The total is known now."""
        del total

    def finish(self) -> None:
        """The phase is over."""


class Silent:
    """Hears nothing."""

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """A bar that shows nothing."""
        del phase, total, unit, done
        return SilentBar()

    def message(self, text: str) -> None:
        """Forget it."""
        del text


_PHASE: ContextVar[Bar | None] = ContextVar("mmquant.phase", default=None)
_CURRENT: ContextVar[Monitor] = ContextVar("mmquant.monitor", default=Silent())  # noqa: B039  it has no state


def current() -> Monitor:
    """The monitor of the run that this thread works for."""
    return _CURRENT.get()


def message(text: str) -> None:
    """Tell whoever watches now one line."""
    current().message(text)


@contextmanager
def watching(monitor: Monitor | None) -> Iterator[None]:
    """Let `monitor` watch what runs inside; None leaves whoever watches already."""
    if monitor is None:
        yield
        return
    token = _CURRENT.set(monitor)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def phase(name: str, total: int | None, unit: str, done: int = 0) -> Iterator[Bar]:
    """A phase of the current run, finished in any case."""
    bar = current().start(name, total, unit, done)
    token = _PHASE.set(bar)
    try:
        yield bar
    finally:
        _PHASE.reset(token)
        bar.finish()


def tell(note: str) -> None:
    """Say beside the innermost phase of this thread what it does now, to a monitor that shows such notes."""
    hears = getattr(_PHASE.get(), "tell", None)
    if hears is not None:
        hears(note)


def counted(kind: str, count: int) -> None:
    """So many more of a `KINDS`, for a monitor that keeps such numbers."""
    hears = getattr(current(), "counted", None)
    if hears is not None and count:
        hears(kind, count)


RESCUED, UNSEEN, PLAIN = "rescued", "unseen", "plain"
KINDS = {
    RESCUED: "experts rescaled that overflowed float16",
    UNSEEN: "experts that saw no token",
    PLAIN: "matrices rounded without error feedback",
}
