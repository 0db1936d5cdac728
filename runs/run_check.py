"""Score the artifacts of a run against the model that they were made of, and hold them against the recipe's gates.

What is being written is scored on the way: after each step every artifact's layer is read back from its files, and
moves the text's hidden states on beside the reference's. What was written before goes through a pass of its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmquant.monitor import current

from ..calibration.evaluate.outcomes import Outcome
from ..calibration.evaluate.streamed import Scoring
from ..calibration.model.distributed import current_ranks
from ..calibration.model.divided import from_owner
from ..calibration.model.reading import FirstReads
from ..convert import manifest
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import write_whole
from ..convert.files.parse import parse_json
from ..convert.hub.ledger import sent
from .artifacts import plain
from .evaluation.result import document, failures
from .evaluation.run import evaluate, record, settings_of
from .evaluation.text import make_eval_sample, sets_of
from .journal import CHECKED, STATES, STREAMS, Journal
from .recipe.read import Recipe

if TYPE_CHECKING:
    from ..convert.source import Source


SCORES = "scores.json"  # of artifacts that are not finished yet, in the check's folder


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
        self,
        recipe: Recipe,
        source: Checkpoint,
        jobs: Mapping[str, Readable],
        device: str,
        folder: Path,
        guard: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """guard: hears, before any artifact is read, from which layer on they will be."""
        assert recipe.check is not None
        self.guard = guard
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
        """Every artifact has the step; with the last one the scores are known, and durable before anything is gone."""
        if self.scoring is None:
            self._begin()
        self._advance(step)
        if step == self.source.geometry.layers + 1:
            self._conclude()

    def _begin(self) -> None:
        names = " ".join(f"{name} {sorted(job.run.items())}" for name, job in self.jobs.items())
        candidates = [read_by_first(job) for job in self.jobs.values()]
        identity = f"{self.sample.fingerprint()} {self.source.fingerprint} {self.settings.dtype} {names}"
        ranks = current_ranks()
        self.scoring = Scoring(self.source, candidates, self.sample, self.settings, ranks=ranks, identity=identity)
        self.scoring.state.every = 0.0
        self.guard(self.scoring.state.newest(self.scoring.ranks))
        self.layer = self.scoring.begin()

    def _advance(self, step: int) -> None:
        """Through the layers whose steps all artifacts have."""
        assert self.scoring is not None
        while self.layer < min(step, self.source.geometry.layers):
            self.scoring.advance(self.layer)
            self.layer += 1

    def _conclude(self) -> None:
        assert self.scoring is not None
        outcomes = self.scoring.finish(keep=True)
        if self.scoring.ranks.first:
            self._keep(outcomes)
        self.scoring.forget()

    def _keep(self, outcomes: list[Outcome]) -> None:
        """Scores, durable before any artifact goes."""
        check = self.recipe.check
        made_of = {"label": self.source.label, "fingerprint": self.source.fingerprint, "stored": None}
        dtype, seed = str(self.settings.dtype).removeprefix("torch."), check.seed if check else 0
        settings = {"seed": seed, "dtype": dtype, "activations": self.settings.activations}
        candidates = [job.growing() for job in self.jobs.values()]
        found = document(outcomes, self.sample, candidates, made_of, **settings)
        kept = {"check": asked_check(self.recipe), "runs": {name: job.run for name, job in self.jobs.items()}}
        write_whole(self.folder / SCORES, json.dumps(kept | {"document": found}).encode())

    def catch_up(self) -> bool:
        """Whether there are scores; they are made where a run was killed between the last step and them."""
        if self.scoring is None or self.layer != self.source.geometry.layers:
            return False
        if not from_owner((self.folder / SCORES).is_file):
            self._conclude()
        return True

    def finish(self, out: Path, journal: Journal) -> None:
        """Scores into journal and manifests, of finished artifacts."""
        if self.catch_up():
            note_kept_scores(self.recipe, journal, out, self.folder)


def read_by_first(job: Readable) -> Source:
    """An artifact on its way, which the rank that writes it reads for all."""
    ranks = current_ranks()
    if ranks.world == 1:
        return job.growing()
    return FirstReads(job.growing() if ranks.first else None)


def note_kept_scores(recipe: Recipe, journal: Journal, out: Path, folder: Path) -> None:
    """Scores that a run left in `folder`, into the journal and manifests of the artifacts that they are of."""
    path = folder / SCORES
    if not path.is_file():
        return
    kept = parse_json(path.read_bytes(), str(path))
    if kept.get("check") != asked_check(recipe):
        return
    names = {}
    for (name, run), candidate in zip(kept["runs"].items(), kept["document"]["candidates"], strict=True):
        entry = journal.artifacts.get(name)
        made = manifest.read(out / name) if entry is not None and "path" in entry.facts else None
        if entry is not None and made is not None and "scores" not in entry.facts:
            if made["artifacts"][0]["provenance"]["run"] == run:
                names[name] = candidate
    note_scores(recipe, journal, out, names, kept["document"])


def asked_check(recipe: Recipe) -> dict[str, Any]:
    """What decides scores, for the journal."""
    return {f.name: plain(getattr(recipe.check, f.name)) for f in fields(recipe.check)} if recipe.check else {}


def check_artifacts(
    recipe: Recipe, out: Path, journal: Journal, device: str, announce: Callable[[tuple[str, ...]], None]
) -> str | None:
    """Score what has not been scored in this way; the first gate that fails, over all artifacts.

    announce: hears which paths are scored, before they are.
    """
    if recipe.check is None:
        return None
    scored = {v.name: v for v in recipe.variants if v.command != "calibrate"}
    note_kept_scores(recipe, journal, out, out / STREAMS / "check")
    missing = [name for name in scored if "scores" not in journal.artifacts[name].facts]
    for name in [name for name in missing if is_away(out / name)]:
        current().message(f"{name}: is on its hub and no longer here: not scored")
        missing.remove(name)
        del scored[name]
    if missing:
        paths = [str(out / journal.artifacts[name].facts["path"]) for name in missing]
        announce(tuple(paths))
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
        for name, entry in journal.artifacts.items():
            if "scores" in entry.facts and is_away(journal.folder / name):
                current().message(f"{name}: is on its hub and no longer here: its scores stay those of the last check")
                continue
            entry.facts.pop("scores", None)
        journal.check = asked
        journal.save()


def is_away(folder: Path) -> bool:
    """Whether weights of an artifact were published and deleted, so that it cannot be read any more."""
    return any(name.endswith((".safetensors", ".gguf")) for name in sent(folder))


def scores_of(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A candidate's numbers as the journal keeps them: what gates ask for, the size, and where it loses most."""
    names = ("ppl", "ppl_ratio", "top1", "nonfinite", "tokens")
    kld = {name: candidate["kld"][name] for name in ("mean", "p99", "p999")}
    errors = {found["layer"]: found["relative_error"] for found in candidate["layers"]}
    known = sorted((n for n, error in errors.items() if error), key=lambda n: -gained(errors, n))
    more = {"kld": kld, "bits": candidate.get("bits_per_weight"), "worst_layers": known[:3]}
    return {name: candidate[name] for name in names} | more


def gained(errors: Mapping[int, float | None], layer: int) -> float:
    """What a layer adds to the relative error of the hidden states, squared."""
    before, own = errors.get(layer - 1) or 0.0, errors[layer] or 0.0
    return own**2 - before**2


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
