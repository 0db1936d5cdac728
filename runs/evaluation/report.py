"""Write an evaluation as one HTML file with plots."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError

from ...convert.files.atomic import write_whole
from .result import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Published mean KLD of MiniMax-M2.7 variants: label, GiB, bits per weight, nats. Another protocol: reference with Q6_K
# experts, corpus not stated, context 8192, 10 chunks. Source: https://huggingface.co/Goldkoron/MiniMax-M2.7
PUBLISHED = (
    ("K_G_5.00", 133.1, 5.00, 0.02241), ("K_G_4.50", 119.7, 4.50, 0.02942), ("K_G_4.00", 106.4, 4.00, 0.04405),
    ("K_G_3.50", 93.1, 3.50, 0.06123), ("K_G_3.00", 79.9, 3.00, 0.09874), ("K_G_2.50", 66.6, 2.50, 0.17288),
    ("UD-Q4_K_M", 130.0, 4.90, 0.02453), ("UD-IQ4_XS", 101.0, 3.79, 0.05108), ("UD-Q3_K_M", 94.0, 3.54, 0.06365),
    ("UD-IQ3_XXS", 74.5, 2.80, 0.11976), ("UD-IQ2_M", 65.0, 2.45, 0.19106),
)  # fmt: skip
CIRCLES = (
    '<p class="note">Circles: what others published of MiniMax-M2.7 (Goldkoron\'s model card) by another protocol: '
    "the reference had Q6_K experts, 10 chunks of 8192 tokens, corpus not stated. A guide to the slope, not to be "
    "compared with.</p>"
)
M27_PARAMETERS = 228_689_764_864  # by its geometry; only beside that model are the published points drawn
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .7rem;text-align:right;
border-bottom:1px solid #ddd;white-space:nowrap}.note{color:#555;font-size:.86rem}
td:first-child,th:first-child{text-align:left}img{max-width:100%}
.fail{color:#b00020;font-weight:600}.pass{color:#1b6e3c;font-weight:600}pre{overflow-x:auto;background:#f6f6f6;
padding:.7rem}h2{margin-top:2.5rem}.wide{overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#15181c;color:#dfe3e8}.note{color:#a5adb6}td,th{border-color:#3a4048}
pre{background:#20252b}.fail{color:#ff7b86}.pass{color:#6fce97}}"""


PLOTS = "matplotlib is not installed, expected pip install 'mmquant[report]'"


def has_plots() -> bool:
    """Whether plots can be drawn (matplotlib is there)."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def check_plots(option: str) -> None:
    """InputError, naming the option that asked for plots, where none can be drawn."""
    if not has_plots():
        raise InputError(f"{option}: {PLOTS}")


def write_report(path: Path, result: dict[str, Any]) -> None:
    """Write the report of an eval result; the file appears whole. InputError where matplotlib is not installed."""
    check_plots(str(path))
    parts = [f"<h1>Distance to {html.escape(result['reference']['label'])}</h1>", _summary(result), _numbers(result)]
    if result["candidates"]:
        parts += ["<h2>Size and distance</h2>", _image(_size_plot(result), "KL divergence against size")]
        parts += [CIRCLES] if is_m27(result) else []
        parts += ["<h2>By domain</h2>", _image(_domain_plot(result), "KL divergence by domain")]
    if any(candidate["layers"] for candidate in result["candidates"]):
        parts += ["<h2>Where it is lost</h2>", _image(_layer_plot(result), "relative error by layer")]
        parts += ["<h2>Chosen experts</h2>", _image(_overlap_plot(result), "overlap of the chosen experts")]
    parts += ["<h2>What was measured</h2>", f"<pre>{html.escape(json.dumps(result['sample'], indent=1))}</pre>"]
    parts += [f"<h2>As text</h2><pre>{html.escape(table(result))}</pre>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>mmquant eval</title>'
    head += f"<style>{STYLE}</style>"
    body = "\n".join(parts)
    write_whole(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'.encode())


def _summary(result: dict[str, Any]) -> str:
    sample, gate = result["sample"], result.get("gate")
    text = f"{sample['positions']} positions in {sample['windows']} windows of {sample['context']} tokens, "
    text += (
        f"stride {sample['stride']}, convention {sample['convention']}, engine {result['engine']}, {result['dtype']}, "
        f"activations {result['activations']}"
    )
    text = f"<p>{html.escape(text)}.</p>"
    if gate is None:
        return text
    if gate["passed"]:
        what = "All gates passed" if gate["thresholds"] else "Every position is finite; no other gate was asked for"
        return text + f'<p class="pass">{what}.</p>'
    items = "".join(f"<li>{html.escape(failure)}</li>" for failure in gate["failures"])
    return text + f'<p class="fail">Gates failed:</p><ul class="fail">{items}</ul>'


def _numbers(result: dict[str, Any]) -> str:
    names = ("candidate", "GB", "bits/weight", "PPL", "ratio", "KLD", "95 %", "99.9 %", "max", "top-1 %", "non-finite")
    rows = "".join(f"<th>{name}</th>" for name in names)
    for c in [*result["candidates"], *filter(None, [result["floor"]])]:
        kld, ci = c["kld"], c["kld"]["mean_ci95"]
        cells = (
            c["label"], _form(c.get("bytes", 0) / 1e9 or None, ".3f"), _form(c.get("bits_per_weight"), ".3f"),
            _form(c["ppl"], ".4f"), _form(c["ppl_ratio"], ".5f"), _form(kld["mean"], ".5f"),
            f"{ci[0]:.5f} .. {ci[1]:.5f}" if ci else "-", _form(kld["p999"], ".4f"), _form(kld["max"], ".3f"),
            _form(None if c["top1"] is None else 100 * c["top1"], ".2f"), str(c["nonfinite"]),
        )  # fmt: skip
        rows += "</tr><tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    return f'<div class="wide"><table><tr>{rows}</tr></table></div>'


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _image(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    figure.clear()
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'


def _figure(columns: int, rows: int = 1, width: float = 10.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _short(label: str) -> str:
    return Path(label).name or label


def _colour(index: int) -> str:
    """The colour of a candidate in every plot, by its place in the result."""
    return f"C{index % 10}"


def is_m27(result: dict[str, Any]) -> bool:
    """Whether the model that was scored has as many parameters as MiniMax-M2.7."""
    sized = [c for c in result["candidates"] if c.get("bytes") and c.get("bits_per_weight")]
    return any(round(8 * c["bytes"] / c["bits_per_weight"]) == M27_PARAMETERS for c in sized)


def _size_plot(result: dict[str, Any]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _figure(2)
    measured = [c for c in result["candidates"] if "bytes" in c and c["kld"]["mean"]]
    published = is_m27(result)
    for axes, key, scale in ((left, "bytes", 1e-9), (right, "bits_per_weight", 1.0)):
        if published:
            at = [(gib * 1.073741824 if key == "bytes" else bpw, kld) for _, gib, bpw, kld in PUBLISHED]
            axes.plot(*zip(*at, strict=True), "o", mfc="none", color="gray", label="published, by another protocol")
        for i, c in enumerate(result["candidates"]):
            if c not in measured:
                continue
            low, high = c["kld"]["mean_ci95"] or (c["kld"]["mean"],) * 2
            error = [[max(0.0, c["kld"]["mean"] - low)], [max(0.0, high - c["kld"]["mean"])]]
            axes.errorbar(
                c[key] * scale,
                c["kld"]["mean"],
                yerr=error,
                fmt="s",
                capsize=3,
                color=_colour(i),
                label=_short(c["label"]),
            )
        if result["floor"] and result["floor"]["kld"]["mean"]:
            axes.axhline(result["floor"]["kld"]["mean"], ls=":", color="black", label="noise floor")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))  # more would overlap: 0.0125, 0.0150
        axes.set_xlabel("GB" if key == "bytes" else "bits per weight")
        axes.set_ylabel("mean KL divergence, nats")
        if measured:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    return figure


def _domain_plot(result: dict[str, Any]) -> Figure:
    figure, (axes,) = _figure(1)
    candidates = result["candidates"]
    width = 0.8 / max(1, len(candidates))
    names = [name for name, found in candidates[0]["domains"].items() if found["tokens"]]
    for i, c in enumerate(candidates):
        values = [c["domains"][name]["kld"]["mean"] or 0.0 for name in names]
        axes.bar(
            [at + i * width for at in range(len(names))], values, width, color=_colour(i), label=_short(c["label"])
        )
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(names))], names)
    axes.set_ylabel("mean KL divergence, nats")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7)
    return figure


def _layer_plot(result: dict[str, Any]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(1)
    for i, c in enumerate(result["candidates"]):
        shown = [(layer["layer"], layer["relative_error"]) for layer in c["layers"] if layer["relative_error"]]
        if shown:
            axes.plot(*zip(*shown, strict=True), marker=".", color=_colour(i), label=_short(c["label"]))
            axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("relative error of the hidden state")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
    return figure


def _overlap_plot(result: dict[str, Any]) -> Figure:
    """A heat map for each candidate: layers across, domains down."""
    candidates = [c for c in result["candidates"] if c["layers"]]
    from matplotlib.ticker import MaxNLocator

    figure, all_axes = _figure(1, len(candidates), height=1.8)
    for axes, c in zip(all_axes, candidates, strict=True):
        names = [name for name, found in c["domains"].items() if found["tokens"]]
        none = float("nan")
        values = [
            [none if (v := layer["domains"][name]["expert_overlap"]) is None else v for layer in c["layers"]]
            for name in names
        ]
        lowest = min((v for row in values for v in row if v == v), default=0.0)
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=min(lowest, 0.99), vmax=1.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{_short(c['label'])}: Jaccard overlap of the chosen experts, by layer", fontsize=9)
        figure.colorbar(image, ax=axes)
    return figure
