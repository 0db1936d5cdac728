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
    """Shows a run to whoever sits before it. TQDM_DISABLE=1 leaves the messages alone."""

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """A bar on a terminal, lines elsewhere."""
        if os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false"):
            from mmquant.monitor import SilentBar

            return SilentBar()
        if not sys.stderr.isatty():
            return Lines(phase, total, unit, done)
        return Drawn(phase, total, unit, done)

    def message(self, text: str) -> None:
        """Write a line to stderr, above a bar that is drawn."""
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
        self._last = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._done += count
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            print(f"mmquant: {self._line()}", file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """The total is known now."""
        self._total = total

    def finish(self) -> None:
        """The phase is over."""

    def _line(self) -> str:
        if self._unit == "B":
            of = f" of {self._total / 1e9:.2f}" if self._total is not None else ""
            return f"{self._phase}: {self._done / 1e9:.2f}{of} GB"
        of = f" of {self._total}" if self._total is not None else ""
        return f"{self._phase}: {self._unit} {self._done}{of}"
