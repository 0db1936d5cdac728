"""Render a report: one HTML file that stands alone, from mmquant/data/report.html.jinja.

A report is a list of sections, a section a list of the parts below. They hold plain values; the template escapes all
of them, since names and messages come from checkpoints and files. Only a Plot holds markup, which plots.py makes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A table of values as mmquant.tables shows them. colours: of the rows, as in the plots; "" for none."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    colours: Sequence[str] = ()
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


Part = Text | Listing | Grid | Verbatim | Plot


@dataclass(frozen=True)
class Section:
    """A part of a report under its own heading."""

    heading: str
    parts: Sequence[Part] = field(default_factory=list)


def render(title: str, lead: Sequence[Part], sections: Sequence[Section]) -> str:
    """The page. lead: what stands above the first heading."""
    import jinja2

    template = resources.files("mmquant").joinpath("data", "report.html.jinja").read_text("utf-8")
    every = [part for section in sections for part in section.parts]
    missing = [Text(NO_PLOTS, "note")] if any(isinstance(p, Plot) and not p.svg for p in every) else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(title=title, lead=[*lead, *missing], sections=sections)


def write(path: Path, page: str) -> None:
    """Write a page; the file appears whole. A name that is no valid Unicode is shown with question marks."""
    write_whole(path, page.encode("utf-8", "replace"))
