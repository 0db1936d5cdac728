"""What a terminal shows: a pseudo-terminal for a command, and the few control codes that mmquant writes."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CODES = re.compile(r"\x1b\[(\d*)([AJm])|\r|\n|[^\x1b\r\n]+")


class Screen:
    """Lines as a terminal of so many columns shows them; one that is too long wraps, as on a real one."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def write(self, text: str) -> None:
        for match in CODES.finditer(text):
            part = match[0]
            if match[2] == "A":
                self.row = max(0, self.row - int(match[1] or 1))
            elif match[2] == "J":
                self.lines = [*self.lines[: self.row], self.lines[self.row][: self.column]]
            elif match[2] == "m":
                continue
            elif part == "\r":
                self.column = 0
            elif part == "\n":  # the terminal's driver makes a line's end of it
                self._down()
                self.column = 0
            else:
                self._put(part)

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")

    def _put(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1


class Stream(io.StringIO):
    """A terminal's stream that hands everything to a screen."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.screen.write(text)
        return len(text)


def shown(
    command: Sequence[str],
    columns: int,
    environment: Mapping[str, str],
    folder: Path,
    heard: Callable[[Screen], None] = lambda screen: None,
) -> tuple[Screen, int]:
    """The screen of a command in `folder` at its end, and its exit code; `heard` sees it after each piece of output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=dict(environment), cwd=folder)
    os.close(slave)
    screen = Screen(columns)
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # Linux's end of a terminal
            break
        if not data:
            break
        screen.write(data.decode(errors="replace"))
        heard(screen)
    os.close(master)
    return screen, process.wait()
