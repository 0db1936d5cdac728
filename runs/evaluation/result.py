"""The result of an evaluation: JSON document, table, gates, and the manifest's block."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmquant import __version__
from mmquant.errors import InputError
from mmquant.tables import Size, cell, percent
from mmquant.tables import table as aligned

from ...calibration.evaluate.metrics import summarise
from ...calibration.evaluate.streamed import ENERGY, ERROR, NONFINITE, OVERLAP, TOKENS, Outcome
from ...calibration.text.sample import Sample
from ...convert.source import Source

SCHEMA, SCHEMA_VERSION = "mmquant-eval", "1.2"
NUMBERS = ("candidate", "GB", "bits/w", "PPL", "ratio", "+-", "KLD", "95 %", "99.9 %", "top-1 %", "nonfinite")
# Threshold -> where its number stands in a candidate, and whether the number must stay below or above.
GATES = {
    "max_ppl_ratio": ("ppl_ratio", "max"),
    "max_kld": ("kld.mean", "max"),
    "max_kld_p99": ("kld.p99", "max"),
    "max_kld_p999": ("kld.p999", "max"),
    "min_top1": ("top1", "min"),
}


def candidate_block(outcome: Outcome, sample: Sample, source: Source | None, seed: int) -> dict[str, Any]:
    """One candidate's numbers: over everything, by domain, by layer."""
    units, domain = sample.units(), np.repeat(sample.domain, sample.scored)
    block: dict[str, Any] = {"label": outcome.label, "context": sample.context}
    block |= summarise(outcome.scores, units, seed)
    if source is not None:
        block |= {"bytes": source.bytes, "bits_per_weight": 8 * source.bytes / source.geometry.parameters}
    block["domains"] = {
        name: summarise(outcome.scores.take(domain == i), units[domain == i], seed)
        for i, name in enumerate(sample.domains)
    }
    block["layers"] = [_layer_block(i, loss, sample.domains) for i, loss in enumerate(outcome.layers)]
    return block


def _layer_block(layer: int, loss: Tensor, domains: tuple[str, ...]) -> dict[str, Any]:
    whole = _loss(loss.sum(1).tolist())
    whole |= {"domains": {name: _loss(loss[:, i].tolist()) for i, name in enumerate(domains)}}
    return {"layer": layer} | whole


def _loss(sums: list[float]) -> dict[str, Any]:
    tokens, energy = sums[TOKENS], sums[ENERGY]
    return {
        "relative_error": float(np.sqrt(sums[ERROR] / energy)) if energy > 0 else None,
        "expert_overlap": sums[OVERLAP] / tokens if tokens > 0 and not np.isnan(sums[OVERLAP]) else None,
        "nonfinite": int(sums[NONFINITE]),
    }


def document(
    outcomes: list[Outcome],
    sample: Sample,
    sources: list[Source],
    reference: dict[str, Any],
    *,
    engine: str = "mmquant",
    seed: int = 0,
    dtype: str = "float32",
    activations: str = "exact",
) -> dict[str, Any]:
    """The whole result; a noise floor stands beside the candidates, not among them."""
    found = [
        candidate_block(outcome, sample, sources[i] if i < len(sources) else None, seed)
        for i, outcome in enumerate(outcomes)
    ]
    candidates, rest = found[: len(sources)], found[len(sources) :]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "generated": datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z"),
        "generator": {"name": "mmquant", "version": __version__},
        "engine": engine,
        "dtype": dtype,
        "activations": activations,
        "reference": reference,
        "sample": sample_block(sample, seed),
        "candidates": candidates,
        "floor": rest[0] if rest else None,
    }
    if len(candidates) == 1:
        result = {k: v for k, v in candidates[0].items() if k not in ("label", "layers", "domains")} | result
    return result


def sample_block(sample: Sample, seed: int) -> dict[str, Any]:
    """What was scored, exactly enough to do it again."""
    half = sample.convention == "llama.cpp"
    return {
        "context": sample.context,
        "stride": sample.stride,
        "convention": sample.convention,
        "scored": "positions context//2 .. context-2 of each window" if half else "every position that predicts",
        "windows": sample.windows,
        "positions": int(sample.scored.sum()),
        "tokens_sha256": sample.fingerprint(),
        "interval": {"level": 0.95, "method": "bootstrap", "unit": sample.unit, "seed": seed},
        "texts": list(sample.texts),
    }


def read_gate(path: Path) -> dict[str, float]:
    """Thresholds of a YAML or JSON file (or of its `gate` section). Raises ValueError for an unknown name."""
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: no such file, expected thresholds such as max_kld: 0.02")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    data = data.get("gate", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise InputError(f"{path}: a {type(data).__name__}, expected thresholds such as max_kld: 0.02")
    return check_gate(data, str(path))


LARGEST = 1e300  # of a threshold: neither NaN nor infinity nor an integer that is no float is below it


def check_gate(data: dict[str, Any], where: str) -> dict[str, float]:
    """Thresholds by name, all numbers; ValueError for anything else."""
    for name, value in data.items():
        if name not in GATES:
            raise InputError(f"{where}: unknown threshold {name}, expected one of {', '.join(GATES)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise InputError(f"{where}: {name} is {value!r}, expected a number")
    return {name: float(value) for name, value in data.items()}


def failures(candidate: dict[str, Any], thresholds: dict[str, float]) -> list[str]:
    """What a candidate fails, in the order of GATES; non-finite positions always fail, and first."""
    label = candidate["label"]
    found = []
    if candidate["nonfinite"]:
        found.append(f"{label}: nonfinite is {candidate['nonfinite']} of {candidate['tokens']} positions, expected 0")
    for name, (where, side) in GATES.items():
        limit = thresholds.get(name)
        if limit is None:
            continue
        value: Any = candidate
        for key in where.split("."):
            value = value[key]
        if value is None or (value > limit if side == "max" else value < limit):
            shown = "nothing" if value is None else f"{value:.6g}"
            found.append(f"{label}: {where} is {shown}, expected at {'most' if side == 'max' else 'least'} {limit:g}")
    return found


def apply_gate(result: dict[str, Any], thresholds: dict[str, float]) -> str | None:
    """Note thresholds and failures in the result; returns the first failure, None when all passed."""
    found = []
    for candidate in result["candidates"]:
        candidate["failures"] = failures(candidate, thresholds)
        found += candidate["failures"]
    result["gate"] = {"thresholds": thresholds, "passed": not found, "failures": found}
    return found[0] if found else None


def quality_block(result: dict[str, Any], candidate: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `quality` of mmquant.fit.json for one candidate of a result (its only one by default)."""
    chosen = candidate if candidate is not None else result["candidates"][0]
    failed = chosen.get("failures") or failures(chosen, {})
    names = ("tokens", "ppl", "ppl_stderr", "ppl_reference", "ppl_ratio", "ppl_ratio_ci95", "kld", "top1", "shift_rms")
    reference = result["reference"]
    corpus = {k: v for k, v in result["sample"].items() if k != "interval"}
    return {
        "status": "fail" if failed else "pass" if result.get("gate", {}).get("thresholds") else "measured",
        "reference": reference["label"],
        "corpus": corpus | {"engine": result["engine"], "activations": result["activations"]},
        "metrics": {name: chosen[name] for name in (*names, "nonfinite")},
    }


def validate(result: dict[str, Any]) -> None:
    """Hold a result against its schema; a mismatch is our bug."""
    import jsonschema

    path = resources.files("mmquant").joinpath("data", "schema", "mmquant-eval-1.schema.json")
    jsonschema.validate(result, json.loads(path.read_text()))


def table(result: dict[str, Any]) -> str:
    """The result for people: a line for each candidate, then each domain, then the layer that loses most."""
    sample, lines = result["sample"], []
    lines.append(f"reference {cell(result['reference']['label'])}: PPL {cell(_reference_ppl(result))}")
    scored = f"{sample['positions']} positions in {sample['windows']} windows of {sample['context']}"
    kind = result["dtype"] if result["activations"] == "exact" else f"activations of {result['activations']}"
    lines.append(f"{scored} ({sample['convention']}), engine {result['engine']}, {kind}")
    rows = [_row(candidate) for candidate in [*result["candidates"], *filter(None, [result.get("floor")])]]
    lines += aligned(NUMBERS, rows, text=("candidate",))
    domains = [
        (c["label"], name, d["ppl"], d["kld"]["mean"], percent(d["top1"], 3))
        for c in result["candidates"]
        for name, d in c["domains"].items()
        if len(c["domains"]) > 1 and d["tokens"]
    ]
    if domains:
        lines += ["", *aligned(("candidate", "domain", "PPL", "KLD", "top-1 %"), domains, text=("candidate", "domain"))]
    for candidate in result["candidates"]:
        lines += _worst_layer(candidate)
    if "engine_check" in result:
        lines += ["", *_engine_lines(result["engine_check"])]
    return "\n".join(lines)


def _worst_layer(candidate: dict[str, Any]) -> list[str]:
    layers = [layer for layer in candidate["layers"] if layer["relative_error"] is not None]
    if not layers:
        return []
    errors = [0.0, *(layer["relative_error"] for layer in layers)]
    worst = max(range(len(layers)), key=lambda i: errors[i + 1] - errors[i])
    last = layers[-1]
    text = f"{cell(candidate['label'])}: hidden state {last['relative_error']:.3g} off after the last layer, "
    text += f"most added by layer {layers[worst]['layer']}"
    known = [layer for layer in layers if layer["expert_overlap"] is not None]  # a pruned model's have other numbers
    if not known:
        return [text]
    overlap = min(known, key=lambda layer: layer["expert_overlap"])
    return [f"{text}; experts agree least in layer {overlap['layer']} ({overlap['expert_overlap']:.4f})"]


def _engine_lines(check: dict[str, Any]) -> list[str]:
    rows = []
    for c in check["candidates"]:
        off = c["difference"]
        numbers = (c["ppl"], c["kld"]["mean"], c["kld"]["p999"], percent(c["top1"], 3))
        seconds = f"{sum(c['seconds'].values()):.0f}" if "seconds" in c else None
        rows.append((c["label"], *numbers, percent(off["ppl"], 3), off["kld_mean_nats"], seconds))
    head = ("candidate", "PPL", "KLD", "99.9 %", "top-1 %", "PPL off %", "KLD off", "s")
    by = f"by {check['engine']} {check['version']}, reference by {check['reference']}:"
    return [by, *aligned(head, rows, text=("candidate",))]


def _reference_ppl(result: dict[str, Any]) -> float | None:
    return result["candidates"][0]["ppl_reference"] if result["candidates"] else None


def _row(c: dict[str, Any]) -> tuple[object, ...]:
    kld, interval = c["kld"], c["kld"]["mean_ci95"]
    return (
        c["label"],
        Size(c["bytes"]) if "bytes" in c else None,
        f"{c['bits_per_weight']:.3f}" if "bits_per_weight" in c else None,
        *(c["ppl"], c["ppl_ratio"], c["ppl_ratio_stderr"], kld["mean"]),
        f"{cell(interval[0])}..{cell(interval[1])}" if interval else None,
        kld["p999"],
        percent(c["top1"], 3),
        c["nonfinite"],
    )
