"""What the ranks of torchrun do in `mmquant run` beside the first, which alone writes, decides and publishes.

The first rank gives orders (`announce`), the others carry them out with it (`follow`): write these variants, score
these artifacts. In between all take part in the same passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.model.divided import from_owner
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.source import SharedLayer
from .artifacts import job_of, streams_of
from .engine import Job, run_jobs
from .evaluation.run import evaluate
from .models import opened
from .passes import Passes
from .recipe.read import Recipe, Variant
from .run_check import STREAMS, Alongside, readable

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@dataclass(frozen=True)
class Order:
    """Write variants, or score artifacts by path."""

    write: tuple[Variant, ...] = ()
    score: tuple[str, ...] = ()


def announce(order: Order | None) -> None:
    """The first rank says what comes next; None: nothing."""
    from_owner(lambda: order)


def follow(recipe: Recipe, out: Path, device: str, fetch: FetchOptions) -> None:
    """Carry out the first rank's orders until there are no more."""
    with opened(recipe.model, fetch, out) as source:
        while (order := from_owner(_theirs)) is not None:
            if order.score:
                evaluate(order.score, recipe.model, recipe.check, device=device)
            if order.write:
                jobs = jobs_of(source, recipe, out, device, order.write)
                check = alongside(recipe, source, jobs, device, out)
                before, after = (None, None) if check is None else (check.before, check.after)
                with sharing(source) as shared:
                    run_jobs(list(jobs.values()), "run", [shared], before, after)
                if check is not None:
                    check.catch_up()


def _theirs() -> Order | None:
    raise AssertionError("the first rank's")


@contextmanager
def sharing(source: Checkpoint) -> Iterator[SharedLayer]:
    """The layer that all readers of a source use, while a run lasts."""
    source.shared = SharedLayer()
    try:
        yield source.shared
    finally:
        source.shared = None


def jobs_of(
    source: Checkpoint,
    recipe: Recipe,
    out: Path,
    device: str,
    todo: Sequence[Variant],
    make: Callable[[Checkpoint, Variant, str, Path, Passes], Job] = job_of,
) -> dict[str, Job]:
    """Variants as jobs, by name; every rank makes all."""
    passes = Passes(source, device, out / STREAMS)
    streams = {variant.name: streams_of(source, variant) for variant in todo}
    jobs: dict[str, Job] = {}
    for variant in todo:
        passes.others = sum(streams.values()) - streams[variant.name]
        jobs[variant.name] = make(source, variant, recipe.model, out / variant.name, passes)
        jobs[variant.name].label = variant.name
    return jobs


def alongside(recipe: Recipe, source: Checkpoint, jobs: dict[str, Job], device: str, out: Path) -> Alongside | None:
    """The check on the way, where the recipe has one and no artifact was there before."""
    models = readable(jobs)
    if recipe.check is None or not models or any(job.finished for job in models.values()):
        return None
    return Alongside(recipe, source, models, device, out / STREAMS / "check")
