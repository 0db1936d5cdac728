"""The result of an evaluation: JSON document, table, gates, and the manifest's block."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmquant import __version__
from mmquant.errors import InputError

from ...calibration.evaluate.metrics import Scores, summarise
from ...calibration.evaluate.outcomes import Outcome
from ...calibration.evaluate.subjects import ENERGY, ERROR, NONFINITE, OVERLAP, TOKENS
from ...calibration.model.engine_like import Like
from ...calibration.text.sample import Sample
from ...convert.files.parse import parse_yaml, read_small
from ...convert.files.schemas import hold_to_schema
from ...convert.source import Source
from .claims import SCHEMA, beyond_floor, comparisons, refusal, unit_sums

SCHEMA_VERSION = "1.2"
ALSO_INSIDE = ("label", "layers", "domains", "positions", "units", "engine_like", "beyond_floor")  # not at the top
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
    block["positions"] = position_blocks(outcome, sample, seed)
    block["units"] = unit_sums(outcome.scores, units)
    return block


def position_blocks(outcome: Outcome, sample: Sample, seed: int) -> list[dict[str, Any]]:
    """KLD, agreement and overlap of experts (mean over layers) by position in the window, [from, to)."""
    at, units = sample.range_of(sample.positions()), sample.units()
    found = []
    for number, (first, end) in enumerate(sample.ranges):
        block = _short_summary(outcome.scores.take(at == number), units[at == number], seed)
        overlap = [_loss(loss[:, number].tolist())["expert_overlap"] for loss in outcome.positions]
        known = [value for value in overlap if value is not None]
        block["expert_overlap"] = sum(known) / len(known) if known and len(known) == len(overlap) else None
        found.append({"from": first, "to": end, **block})
    return found


def _short_summary(scores: Scores, units: NDArray[np.int64], seed: int) -> dict[str, Any]:
    if not len(scores):
        return {"tokens": 0, "nonfinite": 0, "kld": None, "kld_ci95": None, "top1": None, "ppl_ratio": None}
    whole = summarise(scores, units, seed)
    short = {name: whole[name] for name in ("tokens", "nonfinite", "top1", "ppl_ratio")}
    return {**short, "kld": whole["kld"]["mean"], "kld_ci95": whole["kld"]["mean_ci95"]}


def engine_like_block(outcome: Outcome, sample: Sample, source: Source, like: Like, seed: int) -> dict[str, Any]:
    """A candidate as an engine computes it: which profile, what it rounds and how that is known, and the numbers."""
    rounded = {"profile": outcome.kind, "inputs": like.describe(source), "source": like.profile.source}
    block = candidate_block(outcome, sample, None, seed)
    return rounded | {name: value for name, value in block.items() if name not in ("layers", "context")}


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
    likes: tuple[Like, ...] = (),
) -> dict[str, Any]:
    """The whole result; noise floors stand beside the candidates, not among them."""
    exact = [outcome for outcome in outcomes if outcome.of >= 0 and outcome.kind == "exact"]
    candidates = [candidate_block(outcome, sample, sources[outcome.of], seed) for outcome in exact]
    for candidate in candidates:
        candidate["engine_like"] = []
    by_name = {like.name: like for like in likes}
    for outcome in outcomes:
        if outcome.of >= 0 and outcome.kind != "exact":
            block = engine_like_block(outcome, sample, sources[outcome.of], by_name[outcome.kind], seed)
            candidates[outcome.of]["engine_like"].append(block)
    below = [outcome for outcome in outcomes if outcome.of < 0]
    floors = [{"kind": outcome.kind, **candidate_block(outcome, sample, None, seed)} for outcome in below]
    for candidate in candidates if floors else ():
        candidate["beyond_floor"] = beyond_floor(candidate, floors, seed)
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
        "floor": floors[0] if floors else None,
        "floors": floors,
        "comparisons": comparisons(candidates, seed),
        "claims": [],
    }
    if len(candidates) == 1:
        result = {k: v for k, v in candidates[0].items() if k not in ALSO_INSIDE} | result
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
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected thresholds such as max_kld: 0.02")
    data = parse_yaml(read_small(path, str(path), "thresholds"), str(path))
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
    found += [text for claim in result.get("claims", ()) if (text := refusal(claim)) is not None]
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
    hold_to_schema(result, "eval")
