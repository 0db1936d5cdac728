"""Score the artifacts of a run against the model that they were made of, and hold them against the recipe's gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .artifacts import plain
from .evaluation.result import failures
from .evaluation.run import evaluate, record
from .journal import CHECKED, STATES, Journal
from .recipe.read import Recipe

RESULT = "mmquant-eval.json"


def check_artifacts(recipe: Recipe, out: Path, journal: Journal, device: str) -> str | None:
    """Score what has not been scored in this way; the first gate that fails, over all artifacts."""
    if recipe.check is None:
        return None
    asked = {f.name: plain(getattr(recipe.check, f.name)) for f in fields(recipe.check)}
    if journal.check != asked:
        for entry in journal.artifacts.values():
            entry.facts.pop("scores", None)
        journal.check = asked
        journal.save()
    scored = {v.name: v for v in recipe.variants if v.command != "calibrate"}
    missing = [name for name in scored if "scores" not in journal.artifacts[name].facts]
    if missing:
        paths = [str(out / journal.artifacts[name].facts["path"]) for name in missing]
        found = evaluate(paths, recipe.model, recipe.check, device=device)
        if found is None:
            return None
        for name, path, candidate in zip(missing, paths, found.document["candidates"], strict=True):
            limits = {**recipe.gates, **scored[name].gates}
            candidate["failures"] = failures(candidate, limits)
            record((path,), {**found.document, "candidates": [candidate]})
            journal.artifacts[name].facts["scores"] = scores_of(candidate)
            journal.set(name, max(CHECKED, journal.artifacts[name].state, key=STATES.index))
    return gates(recipe, journal, scored)


def scores_of(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's numbers as the journal keeps them: what gates ask for, and the size."""
    names = ("ppl", "ppl_ratio", "top1", "nonfinite", "tokens")
    kld = {name: candidate["kld"][name] for name in ("mean", "p99", "p999")}
    return {name: candidate[name] for name in names} | {"kld": kld, "bits": candidate.get("bits_per_weight")}


def gates(recipe: Recipe, journal: Journal, scored: Mapping[str, Any]) -> str | None:
    """Hold all scores against the gates, which may have changed since; the first failure."""
    first = None
    for name, variant in scored.items():
        entry = journal.artifacts[name]
        found = failures({"label": name, **entry.facts["scores"]}, {**recipe.gates, **variant.gates})
        entry.facts["failures"] = found
        first = first or next(iter(found), None)
    journal.save()
    return first
