"""Render a report: one HTML file that stands alone, from mmquant/data/report.html.jinja.

A report is a list of sections, a section a list of the parts below. They hold plain values; the template escapes all
of them, since names and messages come from checkpoints and files. Only a Plot holds markup, which plots.py makes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import ClassVar

from mmquant.tables import cells

from ...convert.files.atomic import write_whole

NO_PLOTS = "Plots are missing: matplotlib is not installed, expected pip install 'mmquant[report]'."


@dataclass(frozen=True)
class Text:
    """A paragraph. style: note, warn, pass or fail."""

    text: str
    style: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: Sequence[str]
    style: str = ""
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Grid:
    """A table of values as mmquant.tables shows them.

    colours   of the rows, as in the plots; "" for none
    label     what the table holds, for screen readers; empty: the names of its columns
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    colours: Sequence[str] = ()
    label: str = ""
    kind: ClassVar[str] = "grid"

    @property
    def shown(self) -> list[tuple[str, list[str]]]:
        """(colour, cells) of each row."""
        colours = self.colours or [""] * len(self.rows)
        return list(zip(colours, cells(self.rows), strict=True))


@dataclass(frozen=True)
class Verbatim:
    """Text as it stands."""

    text: str
    kind: ClassVar[str] = "verbatim"


@dataclass(frozen=True)
class Plot:
    """A drawing of plots.py. svg: markup, escaped already; empty where matplotlib is not installed."""

    alt: str
    svg: str
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Command:
    """A command line with a button that copies it. label: what it is for, said to screen readers as well."""

    text: str
    label: str
    kind: ClassVar[str] = "command"


@dataclass(frozen=True)
class Fold:
    """Parts that open on a click, a tap or the Enter key."""

    summary: str
    parts: Sequence[Part]
    kind: ClassVar[str] = "fold"


Part = Text | Listing | Grid | Verbatim | Plot | Command | Fold


@dataclass(frozen=True)
class Section:
    """A part of a report under its own heading."""

    heading: str
    parts: Sequence[Part] = field(default_factory=list)


def render(title: str, lead: Sequence[Part], sections: Sequence[Section]) -> str:
    """The page. lead: what stands above the first heading."""
    import jinja2

    data = resources.files("mmquant").joinpath("data")
    template, script = (data.joinpath(name).read_text("utf-8") for name in ("report.html.jinja", "report.js"))
    every = list(_all_parts([*lead, *(part for section in sections for part in section.parts)]))
    missing = [Text(NO_PLOTS, "note")] if any(isinstance(p, Plot) and not p.svg for p in every) else []
    script = script if any(isinstance(p, Command) for p in every) else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    named = {"title": title, "lead": [*lead, *missing], "sections": sections, "script": script, "digest": digest}
    return environment.from_string(template).render(named)


def _all_parts(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Fold):
            yield from _all_parts(part.parts)


def write(path: Path, page: str) -> None:
    """Write a page; the file appears whole. A name that is no valid Unicode is shown with question marks."""
    write_whole(path, page.encode("utf-8", "replace"))
