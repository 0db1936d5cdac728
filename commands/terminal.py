"""What a terminal shows: live lines and messages on stderr, results on stdout; plain lines in a pipe."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mmquant.tables import WIDTH, folded

from .display import Display, Phase, size_of

if TYPE_CHECKING:
    from mmquant.monitor import Bar

EVERY = 10.0  # seconds between two lines of a phase, where stderr is no terminal
CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """Text without control characters: a server's model name or a file's metadata may hold a terminal's commands."""
    return text.translate(CONTROL)


def print_result(text: str, as_json: bool = False) -> None:
    """A result on stdout. Its tables fit WIDTH; on a terminal its prose is folded between words, JSON never."""
    text = text if as_json else harmless(text)
    prose = sys.stdout.isatty() and not as_json
    click.echo(folded(text, max(WIDTH, size_of(sys.stdout)[0])) if prose else text)


def complain(text: str) -> None:
    """A line on stderr, folded on a terminal, one line elsewhere."""
    print(_fitted(text), file=sys.stderr, flush=True)


def _fitted(text: str) -> str:
    text = harmless(text)
    return folded(text, size_of(sys.stderr)[0]) if sys.stderr.isatty() else text


class Terminal:
    """Shows a run to whoever sits before it. TQDM_DISABLE=1 leaves the messages alone, `quiet` (-q) nothing."""

    def __init__(self) -> None:
        self.quiet = False
        self._display: Display | None = None
        self._heard = Heard(self)

    def start(self, phase: str, total: int | None, unit: str, done: int = 0) -> Bar:
        """Live lines on a terminal, lines now and then elsewhere."""
        if self.quiet or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false"):
            from mmquant.monitor import SilentBar

            return SilentBar()
        if not sys.stderr.isatty():
            return Lines(phase, total, unit, done)
        if self._display is None:
            self._display = Display(sys.stderr)
        return self._display.start(phase, total, unit, done)

    def message(self, text: str) -> None:
        """Write a line to stderr, above what is drawn."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """The same, also with `quiet`."""
        line = f"mmquant: {text}"
        if self._display is None:
            complain(line)
        else:
            self._display.message(_fitted(line))

    def verbose(self) -> None:
        """Show what the modules log of their work."""
        self._heard.setLevel(logging.DEBUG)
        logging.getLogger("mmquant").setLevel(logging.DEBUG)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Log lines of modules and libraries are messages like ours; what is drawn goes at the end."""
        root = logging.getLogger()
        root.addHandler(self._heard)
        try:
            yield
        finally:
            root.removeHandler(self._heard)
            if self._display is not None:
                self._display.close()


class Heard(logging.Handler):
    """Hands lines of the logging module to a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """One line, whoever logs it."""
        self.terminal.warn(" ".join(record.getMessage().removeprefix("mmquant: ").split()))


class Lines:
    """A line now and then: a log file is read by its lines."""

    def __init__(self, phase: str, total: int | None, unit: str, done: int) -> None:
        self._last = time.monotonic()
        self._phase = Phase(phase, total, unit, done, self._last)

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._phase.done += count
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            print(f"mmquant: {self._phase.line(self._last)}", file=sys.stderr, flush=True)

    def expect(self, total: int) -> None:
        """The total is known now."""
        self._phase.total = total

    def tell(self, note: str) -> None:
        """What it does now; the next line has it."""
        self._phase.note = note

    def finish(self) -> None:
        """The phase is over."""
