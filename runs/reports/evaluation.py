"""Report of an evaluation: distance to the reference, over size, by domain and by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.tables import Size, percent

from ..evaluation.table import claim_lines, floor_lines, pair_lines, position_lines, table
from . import plots
from .page import Grid, Listing, Part, Plot, Section, Text, Verbatim, render, write

if TYPE_CHECKING:
    from .plots import Axes, Figure

# Published mean KLD of MiniMax-M2.7 variants: label, GiB, bits per weight, nats. Another protocol: reference with Q6_K
# experts, corpus not stated, context 8192, 10 chunks. Source: https://huggingface.co/Goldkoron/MiniMax-M2.7
PUBLISHED = (
    ("K_G_5.00", 133.1, 5.00, 0.02241), ("K_G_4.50", 119.7, 4.50, 0.02942), ("K_G_4.00", 106.4, 4.00, 0.04405),
    ("K_G_3.50", 93.1, 3.50, 0.06123), ("K_G_3.00", 79.9, 3.00, 0.09874), ("K_G_2.50", 66.6, 2.50, 0.17288),
    ("UD-Q4_K_M", 130.0, 4.90, 0.02453), ("UD-IQ4_XS", 101.0, 3.79, 0.05108), ("UD-Q3_K_M", 94.0, 3.54, 0.06365),
    ("UD-IQ3_XXS", 74.5, 2.80, 0.11976), ("UD-IQ2_M", 65.0, 2.45, 0.19106),
)  # fmt: skip
CIRCLES = (
    "Circles: what others published of MiniMax-M2.7 (Goldkoron's model card) by another protocol: the reference had "
    "Q6_K experts, 10 chunks of 8192 tokens, corpus not stated. A guide to the slope, not to be compared with."
)
M27_PARAMETERS = 228_689_764_864  # by its geometry; only beside that model are the published points drawn
KLD = "mean KL divergence, nats"


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Write the report of an eval result; the file appears whole. Without matplotlib it has no plots and says so."""
    sections = []
    if result["candidates"]:
        circles = [Text(CIRCLES, "note")] if is_m27(result) and plots.available() else []
        sections += [
            Section("Size and distance", [_size_plot(result), *circles]),
            Section("By domain", [domain_plot(result)]),
        ]
    if any(candidate["layers"] for candidate in result["candidates"]):
        sections.append(Section("Where it is lost", [layer_plot(result)]))
        sections.append(Section("Chosen experts", [overlap_plot(result)]))
    sections += [Section(title, [Verbatim("\n".join(lines))]) for title, lines in _more(result) if lines]
    sections.append(Section("What was measured", [Verbatim(json.dumps(result["sample"], indent=1))]))
    sections.append(Section("As text", [Verbatim(table(result))]))
    title = f"Distance to {result['reference']['label']}"
    write(path, render(title, [*_summary(result), _numbers(result)], sections))


def _more(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        ("By position in the window", position_lines(result)),
        ("Beyond the noise floor", floor_lines(result)),
        ("Pairs on the same positions", pair_lines(result)),
        ("Claims", claim_lines(result)),
    ]


def _summary(result: dict[str, Any]) -> list[Part]:
    """What was measured in a sentence, and what the gates say."""
    sample, gate = result["sample"], result.get("gate")
    text = f"{sample['positions']} positions in {sample['windows']} windows of {sample['context']} tokens, "
    text += f"stride {sample['stride']}, convention {sample['convention']}, engine {result['engine']}, "
    parts: list[Part] = [Text(f"{text}{result['dtype']}, activations {result['activations']}.")]
    if gate is None:
        return parts
    if gate["passed"]:
        what = "All gates passed" if gate["thresholds"] else "Every position is finite; no other gate was asked for"
        return [*parts, Text(f"{what}.", "pass")]
    return [*parts, Text("Gates failed:", "fail"), Listing(gate["failures"], "fail")]


def _numbers(result: dict[str, Any]) -> Grid:
    head = ("candidate", "GB", "bits/weight", "PPL", "ratio", "KLD", "95 %", "99.9 %", "max", "top-1 %", "non-finite")
    rows, colours = [], []
    for c, colour in _models(result):
        colours.append(colour)
        kld, ci = c["kld"], c["kld"]["mean_ci95"]
        rows.append(
            (
                c["label"],
                Size(c["bytes"]) if c.get("bytes") else None,
                _form(c.get("bits_per_weight"), ".3f"),
                *(_form(c["ppl"], ".4f"), _form(c["ppl_ratio"], ".5f"), _form(kld["mean"], ".5f")),
                f"{ci[0]:.5f} .. {ci[1]:.5f}" if ci else None,
                *(_form(kld["p999"], ".4f"), _form(kld["max"], ".3f"), percent(c["top1"]), c["nonfinite"]),
            )
        )
    return Grid(head, rows, colours)


def _models(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Candidates, under each the same as engines compute it, and the noise floors, with their colours."""
    for i, candidate in enumerate(result["candidates"]):
        yield candidate, plots.colour(i)
        for like in candidate.get("engine_like", ()):
            yield {**like, "label": f"{candidate['label']} ({like['profile']})"}, ""
    for floor in result.get("floors") or [*filter(None, [result["floor"]])]:
        yield floor, ""


def _form(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def names_of(candidates: Sequence[dict[str, Any]]) -> list[str]:
    """What plots call the candidates: the last part of a path; where two share it, the last two."""
    paths = [Path(candidate["label"]) for candidate in candidates]
    last = [path.name or str(path) for path in paths]
    return [
        plots.label(name if last.count(name) == 1 else "/".join(path.parts[-2:]))
        for name, path in zip(last, paths, strict=True)
    ]


def is_m27(result: dict[str, Any]) -> bool:
    """Whether the model that was scored has as many parameters as MiniMax-M2.7."""
    sized = [c for c in result["candidates"] if c.get("bytes") and c.get("bits_per_weight")]
    return any(round(8 * c["bytes"] / c["bits_per_weight"]) == M27_PARAMETERS for c in sized)


def _size_plot(result: dict[str, Any]) -> Plot:
    """KL divergence over GB, and over bits per weight."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _distances(left, result, "bytes", 1e-9)
        _distances(right, result, "bits_per_weight", 1.0)
        left.set_xlabel("GB")
        right.set_xlabel("bits per weight")
        plots.legend(right)

    return plots.draw("size", "KL divergence against size", paint)


def _distances(axes: Axes, result: dict[str, Any], key: str, scale: float) -> None:
    """Each candidate with its interval, at its size; the published points beside the model that they are of."""
    names = names_of(result["candidates"])
    measured = [(i, c) for i, c in enumerate(result["candidates"]) if "bytes" in c and c["kld"]["mean"]]
    if is_m27(result):
        at = [(gib * 1.073741824 if key == "bytes" else bpw, kld) for _, gib, bpw, kld in PUBLISHED]
        axes.plot(*zip(*at, strict=True), "o", mfc="none", color="gray", label="published, by another protocol")
    for i, c in measured:
        mean = c["kld"]["mean"]
        low, high = c["kld"]["mean_ci95"] or (mean, mean)
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        form = {"fmt": "s", "capsize": 3, "color": plots.colour(i), "label": names[i]}
        axes.errorbar(c[key] * scale, mean, yerr=error, **form)
    if result["floor"] and result["floor"]["kld"]["mean"]:
        axes.axhline(result["floor"]["kld"]["mean"], ls=":", color=plots.INK, label="noise floor")
    plots.few_ticks(axes)
    axes.set_ylabel(KLD)
    if measured:
        plots.log_scale(axes)
    axes.grid()


def domain_plot(result: dict[str, Any]) -> Plot:
    """Bars by domain, one for each candidate."""
    candidates = result["candidates"]
    domains = [name for name, found in candidates[0]["domains"].items() if found["tokens"]]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(candidates)
        for i, (c, name) in enumerate(zip(candidates, names_of(candidates), strict=True)):
            values = [c["domains"][domain]["kld"]["mean"] or 0.0 for domain in domains]
            places = [at + i * width for at in range(len(domains))]
            axes.bar(places, values, width, color=plots.colour(i), label=name)
        axes.set_xticks([at + 0.4 - width / 2 for at in range(len(domains))], [plots.label(d) for d in domains])
        axes.set_ylabel(KLD)
        axes.grid(axis="y")
        plots.legend(axes)

    return plots.draw("domains", "KL divergence by domain", paint)


def layer_plot(result: dict[str, Any]) -> Plot:
    """Relative error of the hidden state after each layer."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (c, name) in enumerate(zip(result["candidates"], names_of(result["candidates"]), strict=True)):
            shown = [(layer["layer"], layer["relative_error"]) for layer in c["layers"] if layer["relative_error"]]
            if shown:
                axes.plot(*zip(*shown, strict=True), plots.stroke(i), marker=".", color=plots.colour(i), label=name)
                plots.log_scale(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the hidden state")
        plots.whole_ticks(axes)
        axes.grid()
        plots.legend(axes)

    return plots.draw("layers", "relative error by layer", paint)


def overlap_plot(result: dict[str, Any]) -> Plot:
    """A heat map for each candidate: layers across, domains down."""
    candidates = [c for c in result["candidates"] if c["layers"]]

    def paint(figure: Figure) -> None:
        all_axes = figure.subplots(len(candidates), squeeze=False).flat
        for axes, c, name in zip(all_axes, candidates, names_of(candidates), strict=True):
            domains = [domain for domain, found in c["domains"].items() if found["tokens"]]
            values = [[_overlap(layer, domain) for layer in c["layers"]] for domain in domains]
            lowest = min((v for row in values for v in row if v == v), default=0.0)
            image = axes.imshow(values, aspect="auto", vmin=min(lowest, 0.99), vmax=1.0)
            plots.whole_ticks(axes)
            axes.set_yticks(range(len(domains)), [plots.label(domain) for domain in domains])
            axes.set_title(f"{name}: Jaccard overlap of the chosen experts, by layer", fontsize=9)
            figure.colorbar(image, ax=axes)

    return plots.draw("overlap", "overlap of the chosen experts", paint, height=1.8 * len(candidates))


def _overlap(layer: dict[str, Any], domain: str) -> float:
    found = layer["domains"][domain]["expert_overlap"]
    return float("nan") if found is None else found
