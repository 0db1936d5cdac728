"""Score the artifacts of a run against the model that they were made of, and hold them against the recipe's gates.

What is being written is scored on the way: after each step every artifact's layer is read back from its files, and
moves the text's hidden states on beside the reference's. What was written before goes through a pass of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..calibration.evaluate.streamed import Scoring
from ..convert.checkpoints.checkpoint import Checkpoint
from .artifacts import plain
from .evaluation.result import document, failures
from .evaluation.run import evaluate, record, settings_of
from .evaluation.text import make_eval_sample, sets_of
from .journal import CHECKED, STATES, Journal
from .models import open_any
from .recipe.read import Recipe

if TYPE_CHECKING:
    from ..convert.source import Source


class Readable(Protocol):
    """An artifact that can be read while it is written."""

    path: Path
    run: dict[str, Any]

    def growing(self) -> Source:
        """The artifact as far as it is durable."""
        ...


class Alongside:
    """The check of artifacts that are being written, by name; hidden states are kept in `folder` after every layer."""

    def __init__(
        self, recipe: Recipe, source: Checkpoint, jobs: Mapping[str, Readable], device: str, folder: Path
    ) -> None:
        assert recipe.check is not None
        self.recipe, self.source, self.jobs, self.device, self.folder = recipe, source, jobs, device, folder
        self.layer, self.seed = 0, recipe.check.seed
        self.scoring: Scoring | None = None
        options, paths = recipe.check, {str(job.path): job for job in jobs.values()}
        used = {path: sets_of([job.run]) for path, job in paths.items()}
        self.sample = make_eval_sample(source, tuple(paths), options, used)
        self.settings = settings_of(device, dataclasses.replace(options, state=folder))

    def before(self, first: int) -> None:
        """Artifacts are open, `first` is their first step that is missing: be ready to score what follows."""
        if first:
            self._begin()
            self._advance(first - 1)

    def after(self, step: int) -> None:
        """Every artifact has the step."""
        if self.scoring is None:
            self._begin()
        self._advance(step)

    def _begin(self) -> None:
        names = " ".join(f"{name} {sorted(job.run.items())}" for name, job in self.jobs.items())
        candidates = [job.growing() for job in self.jobs.values()]
        identity = f"{self.sample.fingerprint()} {self.source.fingerprint} {self.settings.dtype} {names}"
        self.scoring = Scoring(self.source, candidates, self.sample, self.settings, identity=identity)
        self.scoring.state.every = 0.0
        self.layer = self.scoring.begin()

    def _advance(self, step: int) -> None:
        """Through the layers whose steps all artifacts have."""
        assert self.scoring is not None
        while self.layer < min(step, self.source.geometry.layers):
            self.scoring.advance(self.layer)
            self.layer += 1

    def finish(self, out: Path, journal: Journal) -> None:
        """Scores into journal and manifests, of finished artifacts."""
        if self.scoring is None or self.layer != self.source.geometry.layers:
            return
        outcomes = self.scoring.finish()
        made_of = {"label": self.source.label, "fingerprint": self.source.fingerprint, "stored": None}
        candidates = [open_any(str(job.path)) for job in self.jobs.values()]
        dtype, seed = (
            str(self.settings.dtype).removeprefix("torch."),
            self.recipe.check.seed if self.recipe.check else 0,
        )
        settings = {"seed": seed, "dtype": dtype, "activations": self.settings.activations}
        found = document(outcomes, self.sample, candidates, made_of, **settings)
        note_scores(self.recipe, journal, out, dict(zip(self.jobs, found["candidates"], strict=True)), found)


def asked_check(recipe: Recipe) -> dict[str, Any]:
    """What decides scores, for the journal."""
    return {f.name: plain(getattr(recipe.check, f.name)) for f in fields(recipe.check)} if recipe.check else {}


def check_artifacts(recipe: Recipe, out: Path, journal: Journal, device: str) -> str | None:
    """Score what has not been scored in this way; the first gate that fails, over all artifacts."""
    if recipe.check is None:
        return None
    scored = {v.name: v for v in recipe.variants if v.command != "calibrate"}
    missing = [name for name in scored if "scores" not in journal.artifacts[name].facts]
    if missing:
        paths = [str(out / journal.artifacts[name].facts["path"]) for name in missing]
        found = evaluate(paths, recipe.model, recipe.check, device=device)
        if found is None:
            return None
        candidates = dict(zip(missing, found.document["candidates"], strict=True))
        note_scores(recipe, journal, out, candidates, found.document)
    return gates(recipe, journal, scored)


def note_scores(
    recipe: Recipe, journal: Journal, out: Path, candidates: Mapping[str, dict[str, Any]], found: dict[str, Any]
) -> None:
    """Put candidates' scores, by the artifact's name, into manifests and journal."""
    limits = {variant.name: {**recipe.gates, **variant.gates} for variant in recipe.variants}
    for name, candidate in candidates.items():
        entry = journal.artifacts[name]
        candidate["failures"] = failures(candidate, limits[name])
        record((str(out / entry.facts["path"]),), {**found, "candidates": [candidate]})
        entry.facts["scores"] = scores_of(candidate)
        journal.set(name, max(CHECKED, entry.state, key=STATES.index))


def forget_other_scores(recipe: Recipe, journal: Journal) -> None:
    """Scores that were made in another way go."""
    asked = asked_check(recipe)
    if recipe.check is not None and journal.check != asked:
        for entry in journal.artifacts.values():
            entry.facts.pop("scores", None)
        journal.check = asked
        journal.save()


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


def readable(jobs: Mapping[str, object]) -> dict[str, Any]:
    """The artifacts that are models: all but statistics."""
    return {name: job for name, job in jobs.items() if hasattr(job, "growing")}
