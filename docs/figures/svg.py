"""Figures as SVG by hand: boxes, arrows and words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

FILL = {
    "file": "#f3ead7",
    "convert": "#fde2c0",
    "calibration": "#d5efd8",
    "quantize": "#e5dbf7",
    "runs": "#d3e5fa",
    "plain": "#eef0f2",
    "bad": "#f8d3d0",
}
INK, LINE = "#1d2733", "#7b8794"


class Figure:
    """An SVG of boxes, arrows and words; coordinates in pixels, words centred."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
        )
        self.parts = [
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        ]

    def words(self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle", bold: bool = False) -> None:
        """Lines of text around (x, y)."""
        lines = text.split("\n")
        weight = ' font-weight="600"' if bold else ""
        for number, line in enumerate(lines):
            dy = y + 4.5 + (number - (len(lines) - 1) / 2) * (size + 3)
            place = f'x="{x:g}" y="{dy:g}" text-anchor="{anchor}" font-size="{size}"'
            self.parts.append(f"<text {place}{weight}>{escape(line)}</text>")

    def box(self, x: float, y: float, w: float, h: float, text: str, kind: str = "plain", size: int = 13) -> None:
        """A filled box with its words."""
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6"'
        self.parts.append(f'<rect {place} fill="{FILL[kind]}" stroke="{LINE}"/>')
        longest = max(map(len, text.split("\n")))
        self.words(x + w / 2, y + h / 2, text, min(size, int((w - 8) / longest / 0.53)))

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """A line through points with its head at the last one."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"{dash} marker-end="url(#a)"/>'
        )

    def strip(self, y: float, label: str, fields: Sequence[tuple[str, int, str]], scale: float, x: float = 110) -> None:
        """Fields of a struct side by side: words, bytes (drawn in proportion, at least as wide as the words), kind."""
        self.words(x - 8, y + 17, label, 13, "end", True)
        for words, count, kind in fields:
            width = max(6.2 * len(words) + 12, count * scale)
            self.box(x, y, width, 34, words, kind, 11)
            x += width

    def strips(self, blocks: Sequence[tuple[str, float, Sequence[tuple[str, int, str]]]]) -> None:
        """Strips one below the other: label, scale and fields of each."""
        for number, (label, scale, fields) in enumerate(blocks):
            self.strip(12 + 50 * number, label, fields, scale)

    def svg(self) -> str:
        """The document."""
        return self.head + "\n" + "\n".join(self.parts) + "\n</svg>\n"
