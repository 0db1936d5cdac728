"""Calibration report as one HTML file with inline SVG plots; it needs no library and no network."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

from ...quantize.overflow import FP16_MAX
from .report import LayerSummary, domain_balance, findings

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}table{border-collapse:collapse;font-size:.86rem}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #dde3e8}th{font-weight:600}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#44525f}
.warn{background:#fdecea;border-left:4px solid #c6392c;padding:.4rem .8rem;margin:.4rem 0}
.note{color:#5a6875;font-size:.86rem}
"""
COLOURS = ("#2f6fab", "#c8553d", "#3d8f5f", "#8a5aa8", "#b8860b", "#4a9aa8", "#7a7a7a")


def report(layers: list[LayerSummary], domains: tuple[str, ...], description: dict[str, Any], title: str) -> str:
    """The page. layers: in order; description: of the corpus (Corpus.describe)."""
    x = [float(s.layer) for s in layers]
    warnings = "".join(f'<p class="warn">{html.escape(text)}</p>' for text in findings(layers))
    error = [[_middle(s.error_in, k) for s in layers] for k in (0.5, 1.0)]
    error_mid = [[_middle(s.error_mid, k) for s in layers] for k in (0.5, 1.0)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _corpus(description),
        warnings or "<p>Every expert saw tokens; nothing overflows float16.</p>",
        "<h2>Tokens per expert</h2>",
        heatmap([[float(t) for t in s.tokens] for s in layers], "tokens"),
        '<p class="note">One row a layer, one column an expert, darker is more. Red: no token at all.</p>',
        "<h2>Load balance</h2>",
        lines(x, {"largest load / mean": [s.imbalance for s in layers]}, "max / mean"),
        "<h2>Load balance by domain</h2>",
        _domains(layers, domains),
        "<h2>Sampling error of the second moments</h2>",
        lines(
            x,
            {
                "w1, w3: median expert": error[0],
                "w1, w3: worst expert": error[1],
                "w2: median expert": error_mid[0],
                "w2: worst expert": error_mid[1],
            },
            "relative error",
            log=True,
        ),
        "<p>Of each expert, the worse of its two:</p>",
        heatmap([_worse(s) for s in layers], "relative error"),
        '<p class="note">sqrt((1 + effective rank) / effective rows): for independent rows: a lower estimate. '
        "Red: nothing to estimate from.</p>",
        "<h2>Range</h2>",
        lines(
            x,
            {
                "w2 input: largest |sum of 32|": [s.sum32 for s in layers],
                "w2 input: largest |h|": [s.amax_mid for s in layers],
                "w1, w3 input: largest |x|": [s.amax_in for s in layers],
                "float16 limit": [FP16_MAX] * len(layers),
            },
            "magnitude",
            log=True,
        ),
        _range_table(layers),
        "<h2>Outlier channels</h2>",
        _outlier_table(layers),
        "<h2>Routing at the edge</h2>",
        lines(x, {"share of tokens": [s.close_calls for s in layers]}, "gap < 2^-9"),
        '<p class="note">Tokens whose last chosen expert leads the next by less than bfloat16 resolves near 0.5.</p>',
        "<h2>Experts that saw little</h2>",
        _few_table(layers),
        "<h2>Saliency (REAP)</h2>",
        heatmap([_scaled(s.saliency) for s in layers], "share of the layer's largest"),
        '<p class="note">Sum of router weight times output norm, relative to the layer\'s largest.</p>',
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def _middle(values: Sequence[float | None], quantile: float) -> float:
    known = sorted(v for v in values if v is not None)
    return known[min(len(known) - 1, int(quantile * len(known)))] if known else math.nan


def _worse(summary: LayerSummary) -> list[float]:
    """By expert; 0 where it is unknown."""
    pairs = zip(summary.error_in, summary.error_mid, strict=True)
    return [0.0 if first is None or mid is None else max(first, mid) for first, mid in pairs]


def _scaled(values: list[float]) -> list[float]:
    top = max(values) or 1.0
    return [v / top for v in values]


def _row(cells: Sequence[object], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "<table>" + _row(head, "th") + "".join(_row(row) for row in rows) + "</table>"


def _corpus(description: dict[str, Any]) -> str:
    rows = [(s["name"], s["documents"], s["windows"], s["sha256"][:12]) for s in description["sets"]]
    size = f"{description['windows']} windows of {description['context']} tokens, seed {description['seed']}"
    digest = f"fingerprint {description['fingerprint'][:12]}"
    return f"<p>{size}, {digest}.</p>" + _table(("set", "documents", "windows", "sha256"), rows)


def _domains(layers: list[LayerSummary], domains: tuple[str, ...]) -> str:
    experts = len(layers[0].tokens)
    found = domain_balance(layers, domains)
    rows = [(name, count, f"{effective:.1f} of {experts}" if count else "-") for name, count, effective in found]
    return _table(("domain", "routed rows a layer", "effective experts (mean over layers)"), rows)


def _range_table(layers: list[LayerSummary]) -> str:
    rows = [
        (s.layer, ", ".join(map(str, s.overflow)), s.overflow_channels, f"{s.sum32:.4g}") for s in layers if s.overflow
    ]
    if not rows:
        return "<p>No expert's w2 input leaves the range of float16.</p>"
    return _table(("layer", "experts beyond float16", "channels beyond float16", "largest |sum of 32|"), rows)


def _outlier_table(layers: list[LayerSummary]) -> str:
    def some(channels: list[int]) -> str:
        return ", ".join(map(str, channels[:16])) + (f" and {len(channels) - 16} more" if len(channels) > 16 else "")

    rows = [(s.layer, some(s.outliers_in), some(s.outliers_mid)) for s in layers if s.outliers_in or s.outliers_mid]
    if not rows:
        return "<p>No channel carries more than 100 times the median channel's E[x²].</p>"
    return _table(("layer", "channels of the w1, w3 input", "channels of the w2 input, experts pooled"), rows)


def _few_table(layers: list[LayerSummary]) -> str:
    rows = [(s.layer, ", ".join(map(str, s.dead)) or "-", len(s.few)) for s in layers if s.dead or s.few]
    if not rows:
        return "<p>Every expert saw more tokens than it has input channels.</p>"
    return _table(("layer", "without any token", "with fewer tokens than input channels"), rows)


def heatmap(rows: list[list[float]], unit: str) -> str:
    """SVG of a matrix, darker for more, red for zero; hover shows the number."""
    columns, top = len(rows[0]), max(max(row) for row in rows) or 1.0
    width, height = max(3.0, min(40.0, 960 / columns)), max(6.0, min(26.0, 620 / len(rows)))
    cells = []
    for j, row in enumerate(rows):
        cells.append(f'<text x="34" y="{j * height + height / 2 + 4:.1f}" text-anchor="end">{j}</text>')
        for i, value in enumerate(row):
            shade = 245 - int(205 * math.sqrt(value / top))
            colour = "#c6392c" if value == 0 else f"rgb({shade},{min(shade + 12, 255)},{min(shade + 40, 255)})"
            place = (
                f'x="{40 + i * width:.1f}" y="{j * height:.1f}" width="{width - 0.4:.1f}" height="{height - 0.6:.1f}"'
            )
            note = f"layer {j}, expert {i}: {value:.6g} {unit}"
            cells.append(f'<rect {place} fill="{colour}"><title>{note}</title></rect>')
    size = f"0 0 {44 + columns * width:.0f} {len(rows) * height:.0f}"
    return f'<svg viewBox="{size}" width="{44 + columns * width:.0f}" role="img">{"".join(cells)}</svg>'


def _scale(values: list[float], log: bool) -> tuple[Callable[[float], float], list[float]]:
    """(value -> 0..1, tick values) for an axis that holds all values."""
    low, high = min(values), max(values)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        last = max(last, first + 1)
        return (lambda v: (math.log10(v) - first) / (last - first)), [10.0**k for k in range(first, last + 1)]
    low, high = min(0.0, low), high if high > min(0.0, low) else low + 1
    # Ticks at whole multiples of 1, 2 or 5 times a power of ten; the axis ends at one of them.
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    low, high = first * step, last * step
    return (lambda v: (v - low) / (high - low)), [k * step for k in range(first, last + 1)]


def lines(x: list[float], series: dict[str, list[float]], unit: str, log: bool = False) -> str:
    """SVG line plot over layers; values that are not drawable (NaN, zero on a log axis) are left out."""
    shown = {n: [v if math.isfinite(v) and (v > 0 or not log) else None for v in vs] for n, vs in series.items()}
    every = [v for vs in shown.values() for v in vs if v is not None]
    if not every:
        return "<p>No data.</p>"
    place, ticks = _scale(every, log)
    span = max(x[-1] - x[0], 1.0)
    parts = []
    for tick in ticks:
        y = 220 - 200 * place(tick)
        parts.append(f'<line x1="60" x2="760" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e8ec"/>')
        parts.append(f'<text x="54" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for value in x[:: max(1, len(x) // 16)]:
        parts.append(
            f'<text x="{60 + 700 * (value - x[0]) / span:.1f}" y="238" text-anchor="middle">{value:.0f}</text>'
        )
    parts.append('<text x="410" y="254" text-anchor="middle">layer</text>')
    parts.append(f'<text x="60" y="12">{html.escape(unit)}</text>')
    for index, (name, values) in enumerate(shown.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = [
            (60 + 700 * (a - x[0]) / span, 220 - 200 * place(v))
            for a, v in zip(x, values, strict=True)
            if v is not None
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4" fill="{colour}"/>' for a, b in points]
        parts.append(f'<rect x="780" y="{16 + 20 * index}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="798" y="{26 + 20 * index}">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 1000 260" width="1000" role="img">{"".join(parts)}</svg>'
