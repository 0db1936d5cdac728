"""Claims that one artifact is nearer to the original than another: made or refused by a paired bootstrap.

Both were scored on the same positions, so documents (or windows) are drawn once for both, 2,000 times: what the text
does to both alike drops out. The sums of each unit are enough for it, and every result carries them.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

from ...calibration.evaluate.metrics import Scores, bootstrap_weights
from ...convert.files.parse import parse_json

SCHEMA = "mmquant-eval"  # of result documents
SUMS = ("kld", "log_ratio", "same")
NUMBERS = {"kld": "kld", "log_ratio": "log_ppl", "same": "top1"}  # a unit's sum -> the number of a comparison
DIGITS = 9
SAME = ("tokens_sha256", "context", "stride", "convention")  # of the samples of results that can be compared


def unit_sums(scores: Scores, unit: NDArray[np.int64]) -> dict[str, list[float]]:
    """Of each unit of the bootstrap: positions that are finite, and sums over them."""
    _, index = np.unique(unit, return_inverse=True)
    count, kept = int(index.max()) + 1 if len(index) else 0, scores.finite
    values = {"kld": scores.kld, "log_ratio": scores.nll - scores.nll_reference, "same": scores.same.astype(np.float64)}
    sums = {name: np.bincount(index[kept], value[kept], count) for name, value in values.items()}
    found = {name: [float(f"{v:.{DIGITS}g}") for v in column.tolist()] for name, column in sums.items()}
    return {"tokens": np.bincount(index[kept], minlength=count).tolist(), **found}


def paired(first: dict[str, Any], second: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """How much nearer `first` is than `second` (both with `units`): mean differences with intervals, and a verdict.

    A difference is first minus second, per position; p is twice the share of resamples on the other side of zero.
    """
    ours, theirs = first["units"], second["units"]
    tokens = np.array(ours["tokens"], np.float64)
    if ours["tokens"] != theirs["tokens"] or len(tokens) < 2:
        return {"first": first["label"], "second": second["label"], "units": len(tokens), "verdict": "not comparable"}
    weights = bootstrap_weights(len(tokens), seed)
    total = weights @ tokens
    found: dict[str, Any] = {"first": first["label"], "second": second["label"], "units": len(tokens)}
    for name in SUMS:
        change = np.array(ours[name]) - np.array(theirs[name])
        drawn = (weights @ change) / total
        low, high = np.quantile(drawn, (0.025, 0.975))
        share = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
        p = min(1.0, max(2 * share, 1 / len(drawn)))
        mean = float(change.sum() / tokens.sum())
        found[NUMBERS[name]] = {"difference": mean, "ci95": [float(low), float(high)], "p": p}
    low, high = found["kld"]["ci95"]
    found["verdict"] = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return found


def comparisons(candidates: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Every pair of candidates, in their order."""
    return [paired(first, second, seed) for first, second in combinations(candidates, 2)]


def stored_rivals(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The candidates of a stored result of `eval --json`. InputError when it is none, or of other positions."""
    said, rivals = read_rivals(path)
    ours = _made_of(result)
    for name, theirs in said.items():
        if theirs != ours[name]:
            raise InputError(f"{path}: another {name} ({str(theirs)[:24]}), expected {str(ours[name])[:24]}")
    return rivals


def _made_of(result: dict[str, Any]) -> dict[str, Any]:
    """What two results must have in common, by name."""
    said = {name: result["sample"][name] for name in SAME}
    return said | {"reference": result["reference"]["fingerprint"], "activations": result["activations"]}


def read_rivals(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a stored result was made of, and its candidates. InputError when it is none."""
    if not path.is_file():
        raise InputError(f"--better-than {path}: no such file, expected a result of eval --json or an ARTIFACT")
    found = parse_json(path.read_bytes(), str(path))
    try:
        if found["schema"] != SCHEMA:
            raise InputError(f"{path}: schema {found['schema']!r}, expected {SCHEMA!r}")
        said = _made_of(found)
        rivals = [{"label": str(c["label"]), "units": _units(c["units"])} for c in found["candidates"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a result of eval --json of this version (no {error})") from None
    return said, rivals


def _units(units: dict[str, Any]) -> dict[str, list[float]]:
    found = {name: [float(v) for v in units[name]] for name in ("tokens", *SUMS)}
    if len({len(column) for column in found.values()}) != 1 or not np.isfinite(list(found.values())).all():
        raise ValueError("units")
    return {**found, "tokens": [int(v) for v in found["tokens"]]}


def make_claims(result: dict[str, Any], rivals: tuple[str, ...]) -> list[dict[str, Any]]:
    """That every other candidate is better than each rival: one of the candidates, or those of a stored result.

    InputError for a rival that is neither.
    """
    claims = []
    labels = [candidate["label"] for candidate in result["candidates"]]
    for rival in rivals:
        ours = [candidate for candidate in result["candidates"] if candidate["label"] != rival]
        theirs = [candidate for candidate in result["candidates"] if candidate["label"] == rival]
        if rival not in labels:
            ours, theirs = result["candidates"], stored_rivals(Path(rival), result)
        seed = result["sample"]["interval"]["seed"]
        claims += [{**paired(first, second, seed), "claim": "better"} for first in ours for second in theirs]
    for claim in claims:
        claim["holds"] = claim["verdict"] == "better"
    return claims


def check_rivals(rivals: tuple[str, ...], artifacts: tuple[str, ...]) -> None:
    """InputError, before any work, for a rival that is neither among the artifacts nor a stored result."""
    for rival in rivals:
        if rival in artifacts and set(artifacts) != {rival}:
            continue
        path = Path(rival)
        if path.suffix != ".json" or not path.is_file():
            raise InputError(
                f"--better-than {rival}: expected one of several ARTIFACTs, or a file that eval --json wrote"
            )
        read_rivals(path)


def refusal(claim: dict[str, Any]) -> str | None:
    """Why a claim does not hold, in a line; None where it does."""
    if claim["holds"]:
        return None
    text = f"{claim['first']}: not better than {claim['second']}: {claim['verdict']}"
    if "kld" not in claim:
        return text
    low, high = claim["kld"]["ci95"]
    return f"{text} (KLD {claim['kld']['difference']:+.6g}, 95 % {low:+.6g} to {high:+.6g}), expected below 0"


def beyond_floor(candidate: dict[str, Any], floors: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """What differs beyond the noise floor: each number of a candidate beside the largest of the floors' runs.

    KLD, top-1 and perplexity are held against every run by the paired bootstrap, the others by their size alone.
    """
    rows = []
    tests = [paired(candidate, floor, seed) for floor in floors]
    for name, sign, read in PAIRED:
        lows = [_low(test.get(name), sign) for test in tests]
        known = [low for low in lows if low is not None]
        beyond = len(known) == len(tests) and min(known) > 0
        rows.append(_row(name, read(candidate), [read(floor) for floor in floors], beyond, "paired bootstrap"))
    for name, value, others in _plain(candidate, floors):
        beyond = value is not None and all(other is not None and value > other for other in others)
        rows.append(_row(name, value, others, beyond, "size"))
    return rows


PAIRED = (
    ("kld", 1, lambda block: block["kld"]["mean"]),
    ("top1", -1, lambda block: None if block["top1"] is None else 1 - block["top1"]),
    ("log_ppl", 0, lambda block: None if block["ppl_ratio"] is None else abs(float(np.log(block["ppl_ratio"])))),
)


def _low(found: dict[str, Any] | None, sign: int) -> float | None:
    """How far from zero the interval stays on the side that is worse (sign 0: on either)."""
    if found is None:
        return None
    low, high = found["ci95"]
    return low if sign > 0 else -high if sign < 0 else max(low, -high)


def _plain(
    candidate: dict[str, Any], floors: list[dict[str, Any]]
) -> list[tuple[str, float | None, list[float | None]]]:
    found: list[tuple[str, float | None, list[float | None]]] = [
        ("kld p999", candidate["kld"]["p999"], [floor["kld"]["p999"] for floor in floors])
    ]
    for name, block in candidate["domains"].items():
        if len(candidate["domains"]) > 1 and block["tokens"]:
            others = [floor["domains"][name]["kld"]["mean"] for floor in floors]
            found.append((f"kld {name}", block["kld"]["mean"], others))
    if candidate["layers"] and all(floor["layers"] for floor in floors):
        for key, words in (("relative_error", "hidden state"), ("expert_overlap", "experts changed")):
            value, *others = (_last(block, key) for block in (candidate, *floors))
            found.append((words, value, others))
    return found


def _last(block: dict[str, Any], key: str) -> float | None:
    value = block["layers"][-1][key]
    return value if value is None or key == "relative_error" else 1 - value


def _row(name: str, value: float | None, floors: list[float | None], beyond: bool, by: str) -> dict[str, Any]:
    known = [floor for floor in floors if floor is not None]
    return {"number": name, "value": value, "floor": max(known) if known else None, "beyond": beyond, "by": by}
