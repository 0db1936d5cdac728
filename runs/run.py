"""Make every artifact of a recipe in one pass over the checkpoint; a run that was killed continues."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmquant.errors import FitError, MmquantError, PartialError, naming
from mmquant.monitor import Monitor, current, watching
from mmquant.stages import stage_of
from mmquant.tables import table

from ..calibration.model.distributed import world
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.lock import hold
from ..convert.hub.http import TransferError
from .artifacts import asked_of, bytes_of, check_variant, streams_of
from .engine import Job, run_jobs
from .folder import check_disk, written_bytes
from .journal import CHECKED, JOURNAL, LOG, PUSHED, STATES, STREAMS, WRITING, WRITTEN, Entry, Journal, read_journal
from .models import choose_device, opened
from .recipe.read import Push, Recipe, read_recipe
from .results import Result
from .run_check import Alongside, check_artifacts, forget_other_scores, is_away, note_kept_scores
from .run_needs import changes, check_out, check_run, run_needs
from .run_ranks import Order, alongside, announce, follow, jobs_of, sharing
from .uploads import LostError, Piecewise, Uploads
from .watch import Watch

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions
    from .needs import Needs

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
        check_variant(variant)
    if not dry_run:
        check_out(out)
    with watching(monitor), _limited(chosen, place):
        if dry_run:
            return _planned(chosen, out, place, fetch, replace)
        if world()[0] != 0:
            follow(chosen, out, place, _fetch(chosen, fetch))
            return Made(out, [], False, [])
        out.mkdir(parents=True, exist_ok=True)
        with hold(out), partial():
            return Run(chosen, out, place, _fetch(chosen, fetch), replace).go()


@contextmanager
def _limited(recipe: Recipe, device: str) -> Iterator[None]:
    """Plan memory within the recipe's limits."""
    from ..calibration.statistics.layer_pass import memory_limits

    with memory_limits({"cpu": recipe.limits.ram, "cuda": recipe.limits.gpu if device != "cpu" else None}):
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
                self._push()
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
        todo = [v for v in recipe.variants if STATES.index(journal.artifacts[v.name].state) < STATES.index(WRITTEN)]
        if not todo:
            return
        names = tuple(variant.name for variant in todo)
        announce(Order(write=names))
        jobs = jobs_of(source, recipe, self.out, self.device, names)
        uploads = self._uploads(jobs)
        self._check_room(source, jobs)
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
            run_jobs(list(jobs.values()), "run", [shared], hooks.before, after, Watch(journal, len(jobs)))
        for name, job in jobs.items():
            size = max(_bytes(job.path), getattr(job, "bytes", 0))
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
        deleted = frozenset(name for name in chosen if early[name] == orders[name] and deletes(orders[name]))
        return Uploads(chosen, early, deleted, self.journal.event)

    def _check_room(self, source: Checkpoint, jobs: dict[str, Job]) -> None:
        """FitError, before anything is written, when the disk or its limit does not hold all artifacts."""
        have = sum(written_bytes(self.out / name) for name in jobs if (self.out / name).is_dir())
        whole = sum(getattr(job, "room", None) or getattr(job, "bytes", 0) for job in jobs.values())
        check_disk(self.out, max(0, whole - have), source)
        limit = self.recipe.limits.disk
        if limit is not None and whole + source.store.in_flight() > limit:
            needed = whole + source.store.in_flight()
            raise FitError(f"limits.disk {limit:,}: artifacts and shards take {needed:,} bytes")

    def _check(self) -> str | None:
        """Score what has not been scored; the first gate that fails."""
        return check_artifacts(self.recipe, self.out, self.journal, self.device, lambda p: announce(Order(score=p)))

    def _push(self) -> None:
        """Publish what is written and passed; what is on a hub already is found whole."""
        from .push import push

        left = [(order, name) for order in self.recipe.push for name in order.variants]
        for at, (order, name) in enumerate(left):
            entry, where = self.journal.artifacts[name], where_of(order)
            if where in entry.facts.get("pushed", []) or entry.facts.get("failures"):
                continue
            last = all(other != name for _, other in left[at + 1 :])
            delete = last and deletes([order for order, other in left if other == name])
            options = dataclasses.replace(order.options, delete_after_upload=delete)
            with naming(name):
                found = push(self.out / name, order.repo, options)
            pushed = [*entry.facts.get("pushed", []), where]
            self.journal.set(name, PUSHED if last else entry.state, pushed=pushed, url=found.url)


class Hooks:
    """What happens around the steps of all artifacts: the check reads them, then what is whole may leave."""

    def __init__(self, check: Alongside | None, uploads: Uploads) -> None:
        self.check, self.uploads = check, uploads

    def before(self, first: int) -> None:
        """Artifacts are open; `first` is their first step that is missing."""
        if self.check is not None:
            self.check.before(first)
        if self.uploads.jobs:
            self.uploads.begin()

    def after(self, step: int) -> None:
        """Every artifact has the step."""
        if self.check is not None:
            self.check.after(step)
        self.uploads.after(step)


def deletes(orders: Sequence[Push]) -> bool:
    """Whether an artifact goes once it is in all of its repositories."""
    return any(order.options.delete_after_upload for order in orders)


def where_of(order: Push) -> str:
    """A repository, in the journal."""
    return f"{order.options.hub}:{order.repo}"


def _bytes(path: Path) -> int:
    folder = path if path.is_dir() else path.parent
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _planned(recipe: Recipe, out: Path, device: str, fetch: FetchOptions | None, replace: bool) -> Made:
    """What a run would make, from headers alone."""
    with opened(recipe.model, fetch) as source:
        source.validate()
        rows, refusal = [], None
        for variant in recipe.variants:
            label, size = bytes_of(source, variant, recipe.model, out / variant.name)
            rows.append({"name": variant.name, "command": variant.command, "label": label, "bytes": size})
        streams = sum(streams_of(source, variant) for variant in recipe.variants)
        needs = run_needs(recipe, out, source, sum(row["bytes"] for row in rows), streams, device)
        try:
            check_run(recipe, out, source, needs, replace)
        except MmquantError as error:
            refusal = error if isinstance(error, FitError) else FitError(str(error))
        head = ("variant", "command", "artifact", "bytes")
        facts = needs.lines("no" if refusal else "yes")
        return Made(
            out, rows, True, [*table(head, _cells(rows), text=head[:3]), "", *facts], refusal=refusal, needs=needs
        )


def _cells(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(row["name"], row["command"], row["label"], f"{row['bytes']:,}") for row in rows]


def table_of(journal: Journal) -> list[dict[str, Any]]:
    """One row for each artifact of a journal."""
    return [
        {"name": name, "command": entry.asked["command"], "state": entry.state, **entry.facts}
        for name, entry in journal.artifacts.items()
    ]


def summary(journal: Journal, seconds: float) -> list[str]:
    """What a finished run says."""
    rows: list[tuple[str, ...]] = []
    for row in table_of(journal):
        scores = row.get("scores", {})
        numbers = [number(scores.get(n)) for n in ("bits", "kld", "top1")]
        rows.append((row["name"], row["state"], f"{row.get('bytes', 0):,}", *numbers, row.get("path", "-")))
    unpushed = [name for name, entry in journal.artifacts.items() if entry.state in (WRITTEN, CHECKED)]
    head = ("artifact", "state", "bytes", "bits", "KLD", "top-1", "path")
    lines = table(head, rows, text=("artifact", "state", "path"))
    for entry in journal.artifacts.values():
        lines += [f"failed: {text}" for text in entry.facts.get("failures", [])]
    lines += [f"{name}: weights are in {where} without card and manifest" for name, where in half_published(journal)]
    if unpushed:
        lines.append(f"next: mmquant push {journal.folder / unpushed[0]} --repo ORG/NAME")
    return [*lines, f"{journal.model}: {len(rows)} artifacts in {seconds:.0f} s; log in {journal.folder / LOG}"]


def half_published(journal: Journal) -> list[tuple[str, str]]:
    """Artifacts that failed a gate after weights of theirs had left, and the repositories that hold them."""
    failed = {name: entry for name, entry in journal.artifacts.items() if entry.facts.get("failures")}
    there = {
        name: set(entry.facts.get("early", [])) - set(entry.facts.get("pushed", [])) for name, entry in failed.items()
    }
    return [(name, where) for name, places in there.items() for where in sorted(places)]


def number(value: object) -> str:
    """A score as the summary shows it; of a KL divergence its mean."""
    found = value.get("mean") if isinstance(value, dict) else value
    return f"{found:.4g}" if isinstance(found, int | float) else "-"
