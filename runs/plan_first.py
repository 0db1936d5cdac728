"""Plan before an artifact is written: what --size and --target stand for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from mmquant.errors import InputError

from ..convert.checkpoints.checkpoint import Checkpoint
from .options import BudgetOptions, PlannedOptions, PlanOptions
from .plan import PLAN, SENSITIVITY, plan

WORK = ".mmquant.plan"  # inside the folder that is written: the plan, and what was measured for it
Options = TypeVar("Options", bound=PlannedOptions)


def with_plan(
    source: Checkpoint, options: Options, out: Path, device: str, dry_run: bool, command: str = "gguf"
) -> Options:
    """The options with --plan in place of --size and --target: the plan is made now, in a folder inside `out`."""
    if options.size is None and options.target is None:
        return options
    work = out / WORK
    if dry_run and options.sensitivity is None and not (work / SENSITIVITY).exists():
        raise InputError("--dry-run with --size or --target: needs --sensitivity, which `mmquant plan` measures")
    shared = {field.name: getattr(options, field.name) for field in fields(BudgetOptions)}
    if (parallel := getattr(options, "tp", None)) is not None:
        shared["tp"] = parallel
    plan(source, work, PlanOptions(**shared, format=command), device=device)
    return replace(options, plan=work / PLAN, size=None, target=None)
