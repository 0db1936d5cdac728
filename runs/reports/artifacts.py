"""Report of finished artifacts: sizes and distances, which machine runs what, by which command, and their origin."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmquant.tables import Size, gib, percent, plural

from ...convert.files.parse import is_list, is_object
from ...convert.fitting.text import INTRO, command_line, machine_words, placement_words
from . import evaluation, plots
from .page import Command, Fold, Grid, Part, Plot, Section, Text, Verbatim, render

if TYPE_CHECKING:
    from .plots import Figure

Json = Mapping[str, Any]
GRADES = {"yes": 0, "tight": 1, "no": 2}
UNMEASURED = "Not measured: mmquant eval writes distances into the manifest."


def artifacts_page(title: str, manifests: Sequence[Json], evaluations: Sequence[dict[str, Any]] = ()) -> str:
    """The page. manifests: checked, in the order of the tables; evaluations: results of eval on the same artifacts."""
    pairs = [(artifact, manifest) for manifest in manifests for artifact in manifest["artifacts"]]
    pairs.sort(key=lambda pair: pair[0]["weights"]["total"])
    sections = [Section("Artifacts", _artifacts(pairs))]
    sections += [Section("What runs where", _machines(pairs))]
    sections += [s for result in evaluations for s in _measured(result)]
    sections += [Section("How each was made", [_origin(artifact, manifest) for artifact, manifest in pairs])]
    return render(title, _lead(pairs), sections)


def _lead(pairs: Sequence[tuple[Json, Json]]) -> list[Part]:
    models = dict.fromkeys(_model(manifest) for _, manifest in pairs)
    parts: list[Part] = [Text(f"{plural(len(pairs), 'artifact')} of {', '.join(models)}.")]
    licences = [m["license"] for _, m in pairs]
    if any(found["commercial_use"] == "prohibited-without-authorization" for found in licences):
        parts.append(Text("Commercial use needs the licensor's prior written authorization.", "warn"))
    return parts


def _model(manifest: Json) -> str:
    model = manifest["model"]
    name = "a local checkpoint" if model["base_model"] == "unknown" else model["base_model"]
    return name if set(model["base_revision"]) == {"0"} else f"{name} at {model['base_revision'][:12]}"


def _metrics(artifact: Json) -> Json:
    found: object = artifact.get("quality", {}).get("metrics")
    return found if is_object(found) else {}


def distance(artifact: Json) -> tuple[float, float, float] | None:
    """(mean, low, high) KL divergence of an artifact in nats; the mean three times where no interval was measured."""
    kld: object = _metrics(artifact).get("kld")
    mean: object = kld.get("mean") if is_object(kld) else None
    if not is_object(kld) or not isinstance(mean, int | float) or not math.isfinite(mean):
        return None
    interval: object = kld.get("mean_ci95")
    ends = interval if is_list(interval) else []
    numbers = [float(end) for end in ends if isinstance(end, int | float) and math.isfinite(end)]
    low, high = numbers if len(numbers) == 2 else (mean, mean)
    return float(mean), low, high


def _artifacts(pairs: Sequence[tuple[Json, Json]]) -> list[Part]:
    """One row for each artifact, small to large, and the distances over the sizes."""
    head = ("artifact", "GB", "bits/weight", "KLD", "95 %", "top-1 %", "PPL ratio", "runs on")
    rows = [_row(artifact, manifest["targets"]) for artifact, manifest in pairs]
    colours = [plots.colour(i) for i in range(len(pairs))]
    parts: list[Part] = [Grid(head, rows, colours, "artifacts, small to large")]
    if any(distance(artifact) for artifact, _ in pairs):
        parts.append(_size_plot([artifact for artifact, _ in pairs]))
    if not all(distance(artifact) for artifact, _ in pairs):
        parts.append(Text(UNMEASURED, "note"))
    return parts


def _row(artifact: Json, targets: Sequence[Json]) -> tuple[object, ...]:
    own = [t["fits"] for t in targets if t["artifact"] == artifact["id"]]
    runs = f"{sum(fits != 'no' for fits in own)} of {len(own)}" if own else None
    metrics, kld = _metrics(artifact), distance(artifact)
    ratio: object = metrics.get("ppl_ratio")
    top1: object = metrics.get("top1")
    return (
        artifact["id"],
        Size(artifact["weights"]["total"]),
        _form(artifact.get("bits_per_weight"), ".2f"),
        _form(kld[0] if kld else None, ".5f"),
        f"{kld[1]:.5f} .. {kld[2]:.5f}" if kld else None,
        percent(float(top1)) if isinstance(top1, int | float) else None,
        _form(ratio, ".4f"),
        runs,
    )


def _form(value: object, form: str) -> str | None:
    return format(value, form) if isinstance(value, int | float) else None


def _size_plot(artifacts: Sequence[Json]) -> Plot:
    """Mean KL divergence with its interval over GB; what loses nothing has no place on the logarithmic axis."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, artifact in enumerate(artifacts):
            kld = distance(artifact)
            if kld is None or kld[0] <= 0:
                continue
            mean, low, high = kld
            size = artifact["weights"]["total"] / 1e9
            error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            form = {"fmt": "s", "capsize": 3, "color": plots.colour(index), "label": plots.label(artifact["id"])}
            axes.errorbar(size, mean, yerr=error, **form)
        axes.set_xlabel("GB")
        axes.set_ylabel(evaluation.KLD)
        axes.grid()
        if axes.get_legend_handles_labels()[0]:
            plots.log_scale(axes)
        plots.legend(axes)

    return plots.draw("artifacts", "mean KL divergence over size, with 95 % intervals", paint)


def _machines(pairs: Sequence[tuple[Json, Json]]) -> list[Part]:
    """A table of machines and artifacts, then each machine's commands, folded."""
    targets = {(t["id"], t["artifact"]): t for _, manifest in pairs for t in manifest["targets"]}
    ids = list(dict.fromkeys(machine for machine, _ in targets))
    if not ids:
        return [Text("The manifest names no machines.", "note")]
    names = [artifact["id"] for artifact, _ in pairs]
    rows = [(machine, *(_verdict(targets.get((machine, name))) for name in names)) for machine in ids]
    here = " A lone . in a command is the artifact's folder." if any(a["entry"] == "." for a, _ in pairs) else ""
    parts: list[Part] = [
        Text(INTRO + here, "note"),
        Grid(("machine", *names), rows, label="verdict and context by machine"),
    ]
    return [*parts, *(_commands(machine, [targets.get((machine, name)) for name in names]) for machine in ids)]


def _verdict(target: Json | None) -> str | None:
    if target is None:
        return None
    if target["fits"] == "no":
        missing = target.get("missing")
        return f"no, {gib(missing)} missing" if missing else "no"
    return f"{target['fits']}, {_context(target)}"


def _context(target: Json) -> str:
    tokens: int = target["context_tokens"]
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _commands(machine: str, targets: Sequence[Json | None]) -> Fold:
    """What to type on a machine: the largest artifact that fits first, since it is the nearest to the original."""
    fitting = [t for t in reversed(targets) if t is not None and t["fits"] != "no"]
    fitting.sort(key=lambda target: GRADES[target["fits"]])
    words = next((machine_words(t) for t in targets if t is not None), "")
    summary = f"{machine} ({words}): {len(fitting)} of {len(targets)} artifacts fit"
    parts: list[Part] = []
    for target in fitting:
        speed = target.get("tokens_per_second_bound")
        bound = f", at most {speed:,.0f} tokens/s by bandwidth" if speed else ""
        place = placement_words(target)
        placed = "" if place == "-" else f", {place}"
        parts.append(Text(f"{target['artifact']}: {target['fits']}, context {_context(target)}{bound}{placed}"))
        for launch in [target, *target.get("alternatives", [])]:
            line = command_line(launch["launch"] if launch is target else launch)
            parts.append(Command(line, f"{launch['engine']} with {target['artifact']} on {machine}"))
    refused = [t for t in targets if t is not None and t["fits"] == "no"]
    parts += [Text(f"{t['artifact']}: {_verdict(t)}{_reason(t)}", "note") for t in refused]
    return Fold(summary, parts)


def _reason(target: Json) -> str:
    return f" ({target['reason']})" if target.get("reason") else ""


def _measured(result: dict[str, Any]) -> list[Section]:
    """By domain, by layer and by chosen experts, as the report of eval draws them."""
    if not result["candidates"]:
        return []
    sections = [Section("By domain", [evaluation.domain_plot(result)])]
    if any(candidate["layers"] for candidate in result["candidates"]):
        sections.append(Section("Where it is lost, by layer", [evaluation.layer_plot(result)]))
        sections.append(Section("Chosen experts", [evaluation.overlap_plot(result)]))
    return sections


def _origin(artifact: Json, manifest: Json) -> Fold:
    """The command, then hashes, calibration and versions as the manifest has them."""
    provenance = artifact.get("provenance", {})
    generator = manifest.get("generator", {})
    parts: list[Part] = []
    if line := provenance.get("command_line"):
        parts.append(Command(" ".join(map(str, line)), f"how {artifact['id']} was made"))
    parts.append(Verbatim(json.dumps(provenance, indent=1, ensure_ascii=False)))
    files = [(f["path"], Size(f["size"]), f["sha256"]) for f in artifact["files"]]
    parts.append(Grid(("file", "GB", "SHA-256"), files, label=f"files of {artifact['id']}"))
    version = f"{generator.get('name', 'mmquant')} {generator.get('version', '')}".strip()
    return Fold(f"{artifact['id']}: {version}, {str(manifest.get('generated', ''))[:10]}", parts)
