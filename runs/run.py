"""Make every artifact of a recipe in one pass over the checkpoint; a run that was killed continues."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmquant.errors import FitError, MmquantError, PartialError
from mmquant.monitor import Monitor, current, watching
from mmquant.stages import stage_of

from ..calibration.model.distributed import world
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import making
from ..convert.files.lock import hold
from ..convert.hub.http import TransferError
from .artifacts import Plans, asked_of, check_variant, job_of
from .engine import Job, run_jobs
from .journal import JOURNAL, LOG, STATES, STREAMS, WRITING, WRITTEN, Entry, Journal, read_journal
from .models import choose_device, opened
from .outlook import Outlook, lines, needs, outlook, rows_of
from .recipe.read import Recipe, Variant, read_recipe
from .results import Result
from .run_check import check_artifacts, forget_other_scores, is_away, note_kept_scores
from .run_fit import lines_of, note_fits
from .run_jobs import bytes_of, job_again
from .run_needs import changes, check_out, check_run
from .run_push import publish
from .run_ranks import Order, alongside, announce, follow, jobs_of, sharing
from .summary import summary, table_of
from .uploads import Hooks, LostError, Piecewise, Uploads, deletes_early, where_of
from .watch import Watch

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions
    from .needs import Needs
    from .run_fit import Shape

OURS = (JOURNAL, LOG, STREAMS)


@dataclass(frozen=True)
class Made(Result):
    """The artifacts of a run, or with dry_run what they would be.

    table: one dictionary for each artifact. failure: the first gate that failed.
    refusal, needs: of a dry run, what the real one would stop at, and what it takes.
    """

    out: Path
    table: list[dict[str, Any]]
    dry_run: bool
    text: list[str]
    failure: str | None = None
    refusal: MmquantError | None = None
    needs: Needs | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document of --json."""
        return {"out": str(self.out), "artifacts": self.table, "dry_run": self.dry_run, "failure": self.failure} | {
            "refusal": str(self.refusal) if self.refusal else None,
            "needs": self.needs.to_dict() if self.needs else None,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each artifact."""
        return self.table

    def lines(self) -> list[str]:
        """The same for people."""
        return self.text


def run(
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    replace: bool = False,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Made:
    """Make every variant of a recipe, each in its folder `out`/NAME, in one pass over the checkpoint.

    What is finished is left alone, what is unfinished continued; what the recipe asks for differently now is made again
    (a finished artifact only with `replace`).

    Raises InputError for a recipe or folder that will not do, FitError when memory or disk is too small, PartialError
    when the network gives up in between.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe))
    out, place = Path(out), choose_device(device or chosen.device)
    for variant in chosen.variants:
        with chosen.at("variants", variant.name):
            check_variant(variant)
    if not dry_run:
        check_out(out)
    with watching(monitor), _limited(chosen, place):
        if dry_run:
            return _planned(chosen, out, place, fetch, replace)
        if world()[0] != 0:
            follow(chosen, out, place, _fetch(chosen, fetch))
            return Made(out, [], False, [])
        with making(out), hold(out), partial():
            return Run(chosen, out, place, _fetch(chosen, fetch), replace).go()


@contextmanager
def _limited(recipe: Recipe, device: str) -> Iterator[None]:
    """Plan memory within the recipe's limits; a GPU gives no more than its own."""
    from ..calibration.model.gpu import at_most
    from ..calibration.statistics.layer_pass import memory_limits

    gpu = recipe.limits.gpu if device != "cpu" else None
    with memory_limits({"cpu": recipe.limits.ram, "cuda": gpu}), at_most(device, gpu):
        yield


@contextmanager
def partial() -> Iterator[None]:
    """What the network did is no failure of the run: the same command continues."""
    try:
        yield
    except TransferError as error:
        raise PartialError(f"{error}; run again to continue") from None


def _fetch(recipe: Recipe, given: FetchOptions | None) -> FetchOptions:
    from ..convert.hub.store import FetchOptions

    fetch, limits = given or FetchOptions(), recipe.limits
    return dataclasses.replace(fetch, max_shards=limits.shards or fetch.max_shards)


class Run:
    """One run over a recipe."""

    def __init__(self, recipe: Recipe, out: Path, device: str, fetch: FetchOptions, replace: bool) -> None:
        self.recipe, self.out, self.device, self.fetch, self.replace = recipe, out, device, fetch, replace
        check_out(out)
        self.journal = read_journal(out) or Journal(out)
        self.began = time.monotonic()

    def go(self) -> Made:
        """Write, check, publish; the summary."""
        self.journal.state = "running"
        self.journal.save()
        try:
            with opened(self.recipe.model, self.fetch, self.out) as source:
                self._reconcile(source)
                try:
                    self._write(source)
                except LostError as error:
                    self._begin_again(error.names)
                    if world()[1] > 1:  # the other ranks are in the midst of the check
                        raise PartialError(f"{self.out}: a check has to begin anew; run again to continue") from None
                    self._write(source)
                failure = self._check()
                announce(None)
                publish(self.recipe, self.out, self.journal)
                source.close(finished=True)
        except BaseException as error:
            while_ = f" (while in {stage_of(error)})" if stage_of(error) else ""
            self.journal.state = f"stopped: {type(error).__name__}: {error}"[:300] + while_
            self.journal.save()
            facts = {"error": self.journal.state, "stage": stage_of(error), "time": time.time()}
            self.journal.log({"event": "stopped", **facts})
            raise
        self.journal.state = "finished" if failure is None else f"gate: {failure}"
        self.journal.save()
        shutil.rmtree(self.out / STREAMS, ignore_errors=True)
        seconds = time.monotonic() - self.began
        self.journal.log({"event": "finished", "seconds": seconds, "time": time.time()})
        return Made(self.out, table_of(self.journal), False, summary(self.journal, seconds), failure)

    def _reconcile(self, source: Checkpoint) -> None:
        """The journal says what the recipe asks for; what was made for something else goes, and is named."""
        expected = {variant.name: asked_of(variant, source) for variant in self.recipe.variants}
        entries = self.journal.artifacts
        changed = changes(self.out, entries, expected, self.replace)  # before anything goes
        for name in [name for name in entries if name not in expected]:
            current().message(f"{name}: no longer in the recipe; {self.out / name} stays as it is")
            del entries[name]
        for name, difference in changed.items():
            current().message(f"{name}: {difference}: made again")
            del entries[name]
            if (self.out / name).is_dir():
                shutil.rmtree(self.out / name)
        for name, asked in expected.items():
            entries.setdefault(name, Entry(asked))
        self.journal.model, self.journal.layers = source.label, source.geometry.layers
        self.journal.save()

    def _begin_again(self, names: Sequence[str]) -> None:
        """Make artifacts anew of which a check needs files that are gone."""
        for name in names:
            current().message(f"{name}: the check begins anew and reads files that were deleted: made again")
            shutil.rmtree(self.out / name)
            self.journal.artifacts[name] = Entry(self.journal.artifacts[name].asked)
        self.journal.save()

    def _write(self, source: Checkpoint) -> None:
        """Every artifact that is not there, in one pass."""
        recipe, journal = self.recipe, self.journal
        forget_other_scores(recipe, journal)
        if names := self._unreadable():
            self._begin_again(names)
        done = [v for v in recipe.variants if STATES.index(journal.artifacts[v.name].state) >= STATES.index(WRITTEN)]
        found = outlook(recipe, source, self.out, Plans(source, self.out, self.device), done={v.name for v in done})
        todo = [variant for variant in found.variants if variant.name not in found.done]
        if todo:
            if found.refusal is not None:
                raise found.refusal
            self._write_all(source, todo, found.shapes)
        self._note_fits(source, found)

    def _note_fits(self, source: Checkpoint, found: Outlook) -> None:
        """The recipe's machines into manifests, and into the summary."""
        self.journal.fits = lines_of(found.fits)
        self.journal.save()
        if self.recipe.fit is not None:
            for name, shape in found.shapes.items():
                note_fits(self.recipe.fit, self.out / name, shape, source.geometry)

    def _write_all(self, source: Checkpoint, todo: Sequence[Variant], shapes: Mapping[str, Shape]) -> None:
        """One pass over the source."""
        recipe, journal = self.recipe, self.journal
        announce(Order(write=tuple(todo)))
        again = functools.partial(job_again, recipe, self.replace)
        make = again if world()[1] == 1 else job_of  # several ranks make every job together
        jobs = jobs_of(source, recipe, self.out, self.device, todo, make)
        uploads = self._uploads(jobs)
        for name in jobs:
            journal.artifacts[name].state = WRITING
        for name, orders in uploads.orders.items():
            if orders:
                journal.artifacts[name].facts["early"] = [where_of(order) for order in orders]
        journal.save()
        check = alongside(recipe, source, jobs, self.device, self.out)
        if check is not None:
            check.guard = uploads.guard
        hooks = Hooks(check, uploads)
        after = hooks.after if check is not None or uploads.jobs else None  # it waits for what is written
        with sharing(source) as shared, uploads:
            watch = Watch(journal, len(jobs), recipe.limits)
            run_jobs(list(jobs.values()), "run", [shared], hooks.before, after, watch)
        for name, job in jobs.items():
            size = (
                shapes[name].weights.total if name in shapes else bytes_of(self.out / name)
            )  # of statistics: all files
            journal.set(name, WRITTEN, path=str(job.path.relative_to(self.out)), bytes=size)
        if check is not None:
            check.finish(self.out, journal)

    def _unreadable(self) -> list[str]:
        """Artifacts that were to be scored, and of which files have left before they were."""
        if self.recipe.check is None:
            return []
        note_kept_scores(self.recipe, self.journal, self.out, self.out / STREAMS / "check")
        written = {n: e for n, e in self.journal.artifacts.items() if e.state == WRITTEN and "scores" not in e.facts}
        return [name for name in written if is_away(self.out / name)]

    def _uploads(self, jobs: Mapping[str, Job]) -> Uploads:
        """What leaves while it is made."""
        orders = {name: [o for o in self.recipe.push if name in o.variants] for name in jobs}
        early = {name: [o for o in found if o.as_completed] for name, found in orders.items()}
        chosen = {name: cast("Piecewise", job) for name, job in jobs.items() if early[name] and not job.finished}
        deleted = frozenset(name for name in chosen if deletes_early(self.recipe, name))
        return Uploads(chosen, early, deleted, self.journal.event)

    def _check(self) -> str | None:
        """Score what has not been scored; the first gate that fails."""
        return check_artifacts(self.recipe, self.out, self.journal, self.device, lambda p: announce(Order(score=p)))


def _planned(recipe: Recipe, out: Path, device: str, fetch: FetchOptions | None, replace: bool) -> Made:
    """What a run would make, from headers alone."""
    with opened(recipe.model, fetch) as source:
        source.validate()
        found = outlook(recipe, source, out, Plans(source, out, device), dry_run=True)
        takes, refusal = needs(recipe, source, out, device, found), found.refusal
        try:
            check_run(recipe, out, source, takes, replace)
        except MmquantError as error:
            refusal = refusal or (error if isinstance(error, FitError) else FitError(str(error)))
        text = lines(recipe, source, found, takes, refusal)
        return Made(out, rows_of(found), True, text, refusal=refusal, needs=takes)
