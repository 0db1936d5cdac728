"""Draw plots as SVG by matplotlib (extra `report`), which is optional: without it a plot is empty.

Text stays text and takes the colour of the page, so that dark mode reaches it. Labels come from outside: formulas
(`$`) are off, and matplotlib escapes the rest.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmquant.tables import cell

from .page import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours that are told apart on white and on black.
COLOURS = (
    "#3b82c4", "#d95f30", "#3d9a5f", "#a367c2", "#c59a1a", "#2fa3a8", "#d05a8e", "#8a8f3c", "#7a7f87", "#b0623f",
)  # fmt: skip
STROKES = ("-", "--", ":")  # of lines that share a colour
INK = "#010203"  # replaced by currentColor
STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "image.cmap": "viridis",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
SVG = re.compile(r"<svg.*</svg>", re.DOTALL)
IDS = re.compile(r'(\bid="|url\(#|href="#)')


def available() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def colour(index: int) -> str:
    """The colour of a candidate in every plot and table, by its place in the result."""
    return COLOURS[index % len(COLOURS)]


def stroke(index: int) -> str:
    """How the line of a candidate is drawn: those that share a colour differ in it."""
    return STROKES[index // len(COLOURS) % len(STROKES)]


def legend(axes: Axes) -> None:
    """Names beside the plot, where they cover nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def label(text: object) -> str:
    """A label from outside; one that begins with `_` would be left out of legends."""
    shown = cell(text)
    return f" {shown}" if shown.startswith("_") else shown


def draw(name: str, alt: str, paint: Callable[[Figure], None], *, width: float = 10.0, height: float = 4.0) -> Plot:
    """The drawing that `paint` makes on an empty figure of width x height inches.

    name: unique in its page; it keeps the ids of its SVG apart from those of others.
    """
    if not available():
        return Plot(alt, "")
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    settings: dict[Any, Any] = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing", UserWarning)  # the reader's browser has the fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    found = SVG.search(buffer.getvalue())
    assert found is not None
    return Plot(alt, IDS.sub(rf"\g<1>{name}-", found[0]).replace(INK, "currentColor"))


def few_ticks(axes: Axes, count: int = 4) -> None:
    """At most so many ticks across: more would overlap (0.0125, 0.0150)."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=count))


def log_scale(axes: Axes) -> None:
    """A logarithmic axis upwards, whose ticks say 0.2 instead of a formula."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))


def whole_ticks(axes: Axes) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def lines(
    name: str, x: Sequence[float], series: Mapping[str, Sequence[float]], unit: str, *, log: bool = False
) -> Plot:
    """Lines over the layers. What cannot be drawn (NaN, 0 on a logarithmic axis) is left out."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (text, values) in enumerate(series.items()):
            shown = [v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values]
            axes.plot(list(x), shown, stroke(index), marker=".", color=colour(index), label=label(text))
        if log and any(line_has_values(values) for values in series.values()):
            log_scale(axes)
        whole_ticks(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel(label(unit))
        axes.grid()
        legend(axes)

    return draw(name, f"{unit} by layer", paint, height=3.2)


def line_has_values(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis can show any of them."""
    return any(math.isfinite(v) and v > 0 for v in values)


def heatmap(name: str, rows: Sequence[Sequence[float]], unit: str) -> Plot:
    """A matrix, one row per layer and one column per expert; zeros are red."""

    def paint(figure: Figure) -> None:
        from matplotlib.colors import ListedColormap, PowerNorm

        top = max(max(row) for row in rows) or 1.0
        axes = figure.subplots()
        shown = [[v if v > 0 else math.nan for v in row] for row in rows]
        zeros = [[0.0 if v == 0 else math.nan for v in row] for row in rows]
        axes.imshow(zeros, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#d0332a"]))
        image = axes.imshow(
            shown, aspect="auto", interpolation="nearest", cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=top)
        )
        whole_ticks(axes)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label=label(unit))

    return draw(name, f"{unit} by layer and expert", paint, height=min(7.0, 1.6 + 0.12 * len(rows)))
