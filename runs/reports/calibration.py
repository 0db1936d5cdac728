"""Report of a calibration: load, sampling error, range and outliers of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...calibration.statistics.report import LayerSummary, domain_balance, findings
from ...quantize.overflow import FP16_MAX
from . import plots
from .page import Grid, Part, Section, Text, render

LOWER = (
    "sqrt((1 + effective rank) / effective rows), which holds for independent rows: a lower estimate. "
    "Red: nothing to estimate from."
)
EDGE = "Tokens whose last chosen expert leads the next by less than bfloat16 resolves near 0.5."
SALIENCY = "Sum of router weight times output norm, relative to the layer's largest."


def report(layers: list[LayerSummary], domains: tuple[str, ...], description: dict[str, Any], title: str) -> str:
    """The page. layers: in order; description: of the corpus (Corpus.describe)."""
    warnings = [Text(text, "warn") for text in findings(layers)]
    nothing = [Text("Every expert saw tokens; nothing overflows float16.")]
    sections = [
        _tokens(layers),
        Section("Load balance by domain", [_domains(layers, domains)]),
        _sampling(layers),
        _range(layers),
        Section("Outlier channels", [_outliers(layers)]),
        _edge(layers),
        Section("Experts that saw little", [_few(layers)]),
        _saliency(layers),
    ]
    return render(title, [*_corpus(description), *(warnings or nothing)], sections)


def _numbers(layers: list[LayerSummary]) -> list[float]:
    return [float(s.layer) for s in layers]


def _tokens(layers: list[LayerSummary]) -> Section:
    load = {"largest load / mean": [s.imbalance for s in layers]}
    parts = [
        plots.heatmap("tokens", [[float(t) for t in s.tokens] for s in layers], "tokens"),
        Text("One row per layer, one column per expert, darker is more. Red: no token at all.", "note"),
        plots.lines("balance", _numbers(layers), load, "max / mean"),
    ]
    return Section("Tokens per expert", parts)


def _sampling(layers: list[LayerSummary]) -> Section:
    series = {
        "gate, up: median expert": [_quantile(s.error_in, 0.5) for s in layers],
        "gate, up: worst expert": [_quantile(s.error_in, 1.0) for s in layers],
        "down: median expert": [_quantile(s.error_mid, 0.5) for s in layers],
        "down: worst expert": [_quantile(s.error_mid, 1.0) for s in layers],
    }
    parts = [
        plots.lines("sampling", _numbers(layers), series, "relative error", log=True),
        Text("Of each expert, the worse of its two:"),
        plots.heatmap("errors", [_worse(s) for s in layers], "relative error"),
        Text(LOWER, "note"),
    ]
    return Section("Sampling error of the second moments", parts)


def _range(layers: list[LayerSummary]) -> Section:
    series = {
        "input of down: largest |sum of 32|": [s.sum32 for s in layers],
        "input of down: largest |h|": [s.amax_mid for s in layers],
        "input of gate, up: largest |x|": [s.amax_in for s in layers],
        "float16 limit": [FP16_MAX] * len(layers),
    }
    return Section("Range", [plots.lines("range", _numbers(layers), series, "magnitude", log=True), _overflow(layers)])


def _edge(layers: list[LayerSummary]) -> Section:
    series = {"share of tokens": [s.close_calls for s in layers]}
    return Section(
        "Routing at the edge", [plots.lines("edge", _numbers(layers), series, "gap < 2^-9"), Text(EDGE, "note")]
    )


def _saliency(layers: list[LayerSummary]) -> Section:
    rows = [_scaled(s.saliency) for s in layers]
    parts = [plots.heatmap("saliency", rows, "share of the layer's largest"), Text(SALIENCY, "note")]
    return Section("Saliency (REAP)", parts)


def _quantile(values: Sequence[float | None], quantile: float) -> float:
    known = sorted(v for v in values if v is not None)
    return known[min(len(known) - 1, int(quantile * len(known)))] if known else math.nan


def _worse(summary: LayerSummary) -> list[float]:
    """By expert; 0 where it is unknown."""
    pairs = zip(summary.error_in, summary.error_mid, strict=True)
    return [0.0 if first is None or mid is None else max(first, mid) for first, mid in pairs]


def _scaled(values: list[float]) -> list[float]:
    top = max(values) or 1.0
    return [v / top for v in values]


def _corpus(description: dict[str, Any]) -> list[Part]:
    rows = [(s["name"], s["documents"], s["windows"], s["sha256"][:12]) for s in description["sets"]]
    size = f"{description['windows']} windows of {description['context']} tokens, seed {description['seed']}"
    text = Text(f"{size}, fingerprint {description['fingerprint'][:12]}.")
    return [text, Grid(("set", "documents", "windows", "sha256"), rows)]


def _domains(layers: list[LayerSummary], domains: tuple[str, ...]) -> Grid:
    experts = len(layers[0].tokens)
    found = domain_balance(layers, domains)
    rows = [(name, count, f"{effective:.1f} of {experts}" if count else None) for name, count, effective in found]
    return Grid(("domain", "routed rows per layer", "effective experts (mean over layers)"), rows)


def _overflow(layers: list[LayerSummary]) -> Part:
    rows = [
        (s.layer, ", ".join(map(str, s.overflow)), s.overflow_channels, f"{s.sum32:.4g}") for s in layers if s.overflow
    ]
    if not rows:
        return Text("No expert's input of down leaves the range of float16.")
    return Grid(("layer", "experts beyond float16", "channels beyond float16", "largest |sum of 32|"), rows)


def _outliers(layers: list[LayerSummary]) -> Part:
    def some(channels: list[int]) -> str:
        return ", ".join(map(str, channels[:16])) + (f" and {len(channels) - 16} more" if len(channels) > 16 else "")

    rows = [(s.layer, some(s.outliers_in), some(s.outliers_mid)) for s in layers if s.outliers_in or s.outliers_mid]
    if not rows:
        return Text("No channel carries more than 100 times the median channel's E[x²].")
    return Grid(("layer", "channels of the input of gate, up", "channels of the input of down, experts pooled"), rows)


def _few(layers: list[LayerSummary]) -> Part:
    rows = [(s.layer, ", ".join(map(str, s.dead)) or None, len(s.few)) for s in layers if s.dead or s.few]
    if not rows:
        return Text("Every expert saw more tokens than it has input channels.")
    return Grid(("layer", "without any token", "with fewer tokens than input channels"), rows)
