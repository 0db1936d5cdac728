"""The live lines at the bottom of a terminal: one for each phase that is open, with what it tells; messages go above.

Everything is written under one lock, so that a line from a thread is never glued to another one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from shutil import get_terminal_size
from typing import TextIO

from mmquant.tables import clock

DELAY = 1.0  # seconds: what is done sooner shows nothing
REDRAWN = 0.1  # seconds between two drawings at least
TICK = 1.0  # seconds between two drawings while nothing happens
NARROW = 24  # columns of the least bar that is drawn
CLEAR = "\x1b[J"  # from the cursor to the end of the screen
UP = "\x1b[{}A\r"


@dataclass
class Phase:
    """One phase and how far it is; `note`: what it tells of itself."""

    name: str
    total: int | None
    unit: str
    first: int
    began: float
    done: int = field(init=False)
    note: str = ""

    def __post_init__(self) -> None:
        self.done = self.first

    def lines(self, now: float, width: int) -> list[str]:
        """What the terminal shows of it: at most `width` columns."""
        head = self._words(now)
        room = width - len(head) - 2
        if self.total and room >= NARROW:
            inside = min(room, 40) - 2
            full = min(inside, inside * self.done // self.total)
            head += "  [" + "#" * full + "." * (inside - full) + "]"
        return [line[:width] for line in (head, f"  {self.note}" if self.note else "") if line]

    def line(self, now: float) -> str:
        """The same in one line, for a log."""
        return self._words(now) + (f"; {self.note}" if self.note else "")

    def _words(self, now: float) -> str:
        rate = (self.done - self.first) / max(now - self.began, 1e-9)
        return progress_line(self.name, self.unit, self.done, self.total, rate)


def progress_line(phase: str, unit: str, done: int, total: int | None, rate: float) -> str:
    """One line of a phase: what is done, of how much, at which rate (units a second), and how long the rest takes.

    >>> progress_line("pull", "B", 5_000_000_000, 10_000_000_000, 1e8)
    'pull: 5.00 of 10.00 GB, 0.10 GB/s, 0:50 left'
    >>> progress_line("Q4_K_M", "layer", 3, 62, 0.05)
    'Q4_K_M: layer 3 of 62, 20 s each, 19:40 left'
    """
    amount, each = _amounts(unit, done, total, rate)
    left = f", {clock((total - done) / rate)} left" if total is not None and rate > 0 and done < total else ""
    return f"{phase}: {amount}{each}{left}"


def _amounts(unit: str, done: int, total: int | None, rate: float) -> tuple[str, str]:
    if unit == "B":
        of = f" of {total / 1e9:.2f}" if total is not None else ""
        return f"{done / 1e9:.2f}{of} GB", f", {rate / 1e9:.2f} GB/s"
    of = f" of {total}" if total is not None else ""
    speed = f", {1 / rate:.3g} s each" if 0 < rate < 1 else f", {rate:.3g}/s" if rate else ""
    return f"{unit} {done}{of}", speed


def size_of(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal that a stream writes to; where it has none, what the environment says."""
    try:
        return os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return get_terminal_size()


class Display:
    """The lines of a terminal. clock: seconds; size: columns and rows, those of the stream by default."""

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        size: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.stream, self.clock, self.size = stream, clock, size or partial(size_of, stream)
        self._phases: list[Phase] = []
        self._lock = threading.RLock()
        self._shown = 0  # lines that stand on the screen now
        self._drawn = -REDRAWN
        self._ticker: threading.Thread | None = None

    def start(self, name: str, total: int | None, unit: str, done: int) -> LiveBar:
        """A phase begins."""
        with self._lock:
            phase = Phase(name, total, unit, done, self.clock())
            self._phases.append(phase)
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="display", daemon=True)
                self._ticker.start()
        return LiveBar(self, phase)

    def message(self, text: str) -> None:
        """A line above what is drawn."""
        with self._lock:
            self._erase()
            self.stream.write(text + "\n")
            self._draw()

    def change(self, phase: Phase, count: int = 0, total: int | None = None, note: str | None = None) -> None:
        """A phase has come further, or knows more of itself."""
        with self._lock:
            phase.done += count
            phase.total = phase.total if total is None else total
            phase.note = phase.note if note is None else note
            if self.clock() - self._drawn >= REDRAWN:
                self._erase()
                self._draw()

    def finish(self, phase: Phase) -> None:
        """A phase is over; what it showed stays as its last line, bytes apart."""
        with self._lock:
            if phase not in self._phases:
                return
            self._phases.remove(phase)
            self._erase()
            now = self.clock()
            if now - phase.began >= DELAY and phase.unit != "B":
                phase.note = ""
                self.stream.write(phase.lines(now, self._width())[0] + "\n")
            self._draw()

    def close(self) -> None:
        """Take away what is drawn: the command is over, however it ended."""
        with self._lock:
            self._phases.clear()
            self._erase()
            self.stream.flush()

    def _tick(self) -> None:
        while True:
            time.sleep(TICK)
            with self._lock:
                if not self._phases:
                    self._ticker = None
                    return
                self._erase()
                self._draw()

    def _width(self) -> int:
        return max(20, self.size()[0] - 1)  # the last column wraps on some terminals

    def _erase(self) -> None:
        if self._shown:
            self.stream.write(UP.format(self._shown) + CLEAR)
        self._shown = 0

    def _draw(self) -> None:
        now, width = self.clock(), self._width()
        rows = max(1, self.size()[1] - 1)
        phases = [phase for phase in self._phases if now - phase.began >= DELAY]
        lines = [line for phase in phases for line in phase.lines(now, width)][:rows]
        self.stream.write("".join(line + "\n" for line in lines))
        self.stream.flush()
        self._shown, self._drawn = len(lines), now


class LiveBar:
    """A phase of a display."""

    def __init__(self, display: Display, phase: Phase) -> None:
        self._display, self._phase = display, phase

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._display.change(self._phase, count)

    def expect(self, total: int) -> None:
        """The total is known now."""
        self._display.change(self._phase, total=total)

    def tell(self, note: str) -> None:
        """What it does now."""
        self._display.change(self._phase, note=note)

    def finish(self) -> None:
        """The phase is over."""
        self._display.finish(self._phase)
