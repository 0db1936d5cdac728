"""Show progress and messages on stderr: bars on a terminal, lines in a pipe."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

    from mmquant.monitor import Bar

DELAY = 1.0  # seconds: what is done sooner shows no bar
EVERY = 10.0  # seconds between two lines of a phase, where stderr is no terminal


class Terminal:
    """Shows a run to whoever sits before it. TQDM_DISABLE=1 leaves the messages alone, `quiet` (-q) nothing."""

    def __init__(self) -> None:
        self.quiet = False

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """A bar on a terminal, lines elsewhere."""
        if self.quiet or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false"):
            from mmquant.monitor import SilentBar

            return SilentBar()
        if not sys.stderr.isatty():
            return Lines(phase, total, unit, done)
        return Drawn(phase, total, unit, done)

    def message(self, text: str) -> None:
        """Write a line to stderr, above a bar that is drawn."""
        if self.quiet:
            return
        line = f"mmquant: {text}"
        if "tqdm" not in sys.modules:
            print(line, file=sys.stderr)
            return
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)  # above the bars that are drawn


class Drawn:
    """A tqdm bar."""

    def __init__(self, phase: str, total: int | None, unit: str, done: int) -> None:
        from tqdm import tqdm

        self._bar: tqdm[NoReturn] = tqdm(
            total=total, desc=phase, unit=unit, initial=done, unit_scale=unit == "B", delay=DELAY, leave=unit != "B"
        )

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._bar.update(count)

    def expect(self, total: int) -> None:
        """The total is known now."""
        self._bar.total = total

    def finish(self) -> None:
        """The phase is over."""
        self._bar.close()


class Lines:
    """A line now and then: a log file is read by its lines."""

    def __init__(self, phase: str, total: int | None, unit: str, done: int) -> None:
        self._phase, self._total, self._unit, self._done = phase, total, unit, done
        self._started, self._before = time.monotonic(), done
        self._last = self._started

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._done += count
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            line = progress_line(self._phase, self._unit, self._done, self._total, self._rate())
            print(f"mmquant: {line}", file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """The total is known now."""
        self._total = total

    def finish(self) -> None:
        """The phase is over."""

    def _rate(self) -> float:
        """Units a second of this run."""
        return (self._done - self._before) / max(time.monotonic() - self._started, 1e-9)


def progress_line(phase: str, unit: str, done: int, total: int | None, rate: float) -> str:
    """One line of a phase: what is done, of how much, at which rate (units a second), and how long the rest takes.

    >>> progress_line("pull", "B", 5_000_000_000, 10_000_000_000, 1e8)
    'pull: 5.00 of 10.00 GB, 0.10 GB/s, 0:50 left'
    >>> progress_line("Q4_K_M", "layer", 3, 62, 0.05)
    'Q4_K_M: layer 3 of 62, 20 s each, 19:40 left'
    """
    amount, each = _amounts(unit, done, total, rate)
    left = f", {_clock((total - done) / rate)} left" if total is not None and rate > 0 else ""
    return f"{phase}: {amount}{each}{left}"


def _amounts(unit: str, done: int, total: int | None, rate: float) -> tuple[str, str]:
    if unit == "B":
        of = f" of {total / 1e9:.2f}" if total is not None else ""
        return f"{done / 1e9:.2f}{of} GB", f", {rate / 1e9:.2f} GB/s"
    of = f" of {total}" if total is not None else ""
    speed = f", {1 / rate:.3g} s each" if 0 < rate < 1 else f", {rate:.3g}/s" if rate else ""
    return f"{unit} {done}{of}", speed


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
