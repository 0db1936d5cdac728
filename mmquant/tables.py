"""Print tables: aligned text that fits 80 columns, and Markdown."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 80
GAP = "  "
NARROW = 20  # characters below which a column of text is not squeezed
NONE = "-"
GIB = 1 << 30


class Size(NamedTuple):
    """A cell that holds a size in bytes. It is shown in GB, with the same decimals in all of its column."""

    bytes: int


def cell(value: object) -> str:
    """One value as a table shows it: whole numbers with thousands, others with five digits, None as `-`.

    Unprintable characters, which names from outside may hold, become U+FFFD.
    """
    if value is None:
        return NONE
    if isinstance(value, Size):
        return _gigabytes(value, _decimals([value]))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


def percent(value: float | None, digits: int = 2) -> str:
    """A ratio in per cent, without the sign."""
    return NONE if value is None else f"{100 * value:.{digits}f}"


def cells(rows: Sequence[Sequence[object]]) -> list[list[str]]:
    """All values as a table shows them; the sizes of a column get the same decimals."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    decimals = [_decimals([v for v in column if isinstance(v, Size)]) for column in columns]
    pairs = (zip(row, decimals, strict=True) for row in rows)
    return [[_gigabytes(v, d) if isinstance(v, Size) else cell(v) for v, d in row] for row in pairs]


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:30 or 3:20:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gib(size: int) -> str:
    """Bytes of memory, which is sold in GiB; something is never 0.00."""
    amount = max(size / GIB, 0.01) if size > 0 else 0.0
    return f"{amount:,.{1 if amount >= 10 else 2}f} GiB"


def plural(count: int, word: str) -> str:
    """1 artifact, 2 artifacts."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def folded(text: str, width: int) -> str:
    """The text with lines of at most `width` columns where its words allow it; what goes on is indented.

    A line that begins with a space stays whole: it is a command or a path to copy.
    """
    return "\n".join(part for line in text.split("\n") for part in _folded(line, width))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, text: Sequence[str] = ()) -> list[str]:
    """The lines of a table, none wider than WIDTH.

    head    names of the columns
    rows    one value per column: str, int, float, Size or None
    text    names of the columns of words. They are aligned left, and wrap where the table would be too wide. All
            others are numbers: they are aligned right and stay whole.

    A table that is still too wide continues below itself, and repeats its first column there.
    """
    grid = [list(head), *cells(rows)]
    words = [name in text for name in head]
    natural = [max(_width(row[i]) for row in grid) for i in range(len(head))]
    least = [min(n, max(NARROW, _width(name))) if w else n for n, w, name in zip(natural, words, head, strict=True)]
    lines: list[str] = []
    for block in _blocks(least):
        widths = _squeeze([natural[i] for i in block], [least[i] for i in block])
        lines += [""] if lines else []
        for row in grid:
            lines += _row([row[i] for i in block], widths, [words[i] for i in block])
    return lines


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table in Markdown. A cell cannot break out of its place."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(value.replace("|", "\\|") for value in row) + " |" for row in cells(rows)]
    return "\n".join(lines)


def _decimals(sizes: Sequence[Size]) -> int:
    return 3 if max((size.bytes for size in sizes), default=0) >= 10**9 else 5


def _gigabytes(size: Size, decimals: int) -> str:
    return f"{size.bytes / 1e9:,.{decimals}f}"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _blocks(least: Sequence[int]) -> list[list[int]]:
    """Columns of each part of the table, so that its least widths fit; all parts begin with column 0."""
    blocks = [[0]]
    for column in range(1, len(least)):
        if len(blocks[-1]) > 1 and _total([least[i] for i in (*blocks[-1], column)]) > WIDTH:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def _squeeze(natural: Sequence[int], least: Sequence[int]) -> list[int]:
    """Widths that fit, as far as the least ones allow: the widest column that can be narrower gives way first."""
    widths = list(natural)
    while _total(widths) > WIDTH:
        loose = [i for i, width in enumerate(widths) if width > least[i]]
        if not loose:
            break
        widths[max(loose, key=lambda i: widths[i])] -= 1
    return widths


def _row(row: Sequence[str], widths: Sequence[int], words: Sequence[bool]) -> list[str]:
    """One row: as many lines as its longest cell of words needs."""
    parts = [_wrapped(value, width) if word else [value] for value, width, word in zip(row, widths, words, strict=True)]
    lines = []
    for i in range(max(map(len, parts))):
        at = [part[i] if i < len(part) else "" for part in parts]
        padding = [" " * (width - _width(value)) for value, width in zip(at, widths, strict=True)]
        placed = [v + p if w else p + v for v, p, w in zip(at, padding, words, strict=True)]
        lines.append(GAP.join(placed).rstrip())
    return lines


def _folded(line: str, width: int) -> list[str]:
    if line.startswith(" ") or _width(line) <= width:
        return [line]
    first, *words = line.split(" ")
    lines = [first]
    for word in words:
        if _width(lines[-1]) + 1 + _width(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(GAP + word)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` columns."""
    if _width(text) <= width:
        return [text]
    if _width(text) == len(text):
        return textwrap.wrap(text, width)
    lines, line = [], ""
    for c in text:  # textwrap counts characters, not columns
        if _width(line + c) > width:
            lines.append(line)
            line = ""
        line += c
    return [*lines, line]
