"""The jobs of a run: made of its variants, made again where what they were made of has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmquant.errors import InputError
from mmquant.monitor import current

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.difference import first_difference
from ..convert.files.progress import unfinished_run
from .artifacts import job_of
from .engine import Job
from .passes import Passes
from .place import OccupiedError
from .plan_first import WORK
from .recipe.read import Recipe, Variant


def job_again(
    recipe: Recipe, replace: bool, source: Checkpoint, variant: Variant, model: str, out: Path, passes: Passes
) -> Job:
    """A variant's job; what was made of other texts, plans or statistics by the same options is made again.

    replace: a finished one, too; else InputError.
    """
    with recipe.at("variants", variant.name):
        try:
            job = job_of(source, variant, model, out, passes)
        except OccupiedError as error:
            if not replace:
                raise InputError(f"{error}, or --replace makes it again") from None
            difference = error.difference
        else:
            unfinished = unfinished_run(out) if not job.finished else None
            made = getattr(job, "run", None)
            if unfinished is None or made is None or unfinished == made:
                return job
            difference = first_difference(unfinished, made)
        current().message(f"{variant.name}: {difference}: made again")
        clear(out)
        return job_of(source, variant, model, out, passes)


def clear(out: Path) -> None:
    """Remove what was made of an artifact; its plan, which was made now, stays."""
    for path in out.iterdir():
        if path.name == WORK:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def bytes_of(folder: Path) -> int:
    """Of all visible files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
