"""What stands in a run's way: its folder, and finished artifacts that the recipe now asks for otherwise; its needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmquant.errors import FitError, InputError

from ..calibration.model.hidden import RAM_LIMIT
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.difference import first_difference
from ..convert.gguf.mixes import find_mix
from ..convert.manifest import MANIFEST
from .artifacts import asked_of
from .journal import JOURNAL, LOG, STREAMS, Entry, read_journal
from .needs import Needs, needs_of, seconds_of
from .options import GgufOptions, WeightsOptions
from .place import free_bytes
from .recipe.read import Recipe
from .weights import rate_of

OURS = (JOURNAL, LOG, STREAMS)


def check_out(out: Path) -> None:
    """InputError for a place that is no folder, and for a folder that holds something else than a run."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file, expected a folder or nothing")
    if not out.exists() or read_journal(out) is not None:
        return
    strange = sorted(p.name for p in out.iterdir() if not p.name.startswith(".mmquant") and p.name not in OURS)
    if strange:
        raise InputError(f"{out}: holds {strange[0]}, expected an empty folder or a run of mmquant")


def changes(out: Path, entries: Mapping[str, Entry], expected: Mapping[str, Any], replace: bool) -> dict[str, str]:
    """Artifacts that the recipe asks for otherwise now, with the first difference. InputError for a finished one."""
    found = {name: first_difference(entries[name].asked, expected[name]) for name in expected if name in entries}
    changed = {name: difference for name, difference in found.items() if difference}
    for name, difference in changed.items():
        if (out / name / MANIFEST).exists() and not replace:
            ways = "give it another name, or --replace makes it again"
            raise InputError(f"{out / name}: finished with {difference}; {ways}")
    return changed


def check_run(recipe: Recipe, out: Path, source: Checkpoint, needs: Needs, replace: bool) -> None:
    """What a real run would stop at before its first layer. InputError for the folder, FitError for the disk."""
    check_out(out)
    journal = read_journal(out) if out.exists() else None
    if journal is not None:
        expected = {variant.name: asked_of(variant, source) for variant in recipe.variants}
        changes(out, journal.artifacts, expected, replace)
    limit = min(free_bytes(out), recipe.limits.disk or free_bytes(out))
    if needs.disk > limit:
        raise FitError(f"{out}: {needs.disk:,} bytes are needed, {limit:,} are free")


def run_needs(recipe: Recipe, out: Path, source: Checkpoint, size: int, streams: int, device: str) -> Needs:
    """The needs of all artifacts in one pass; streams: bytes of hidden states, in memory and once more on disk."""
    found = needs_of(source, out, size, device)
    every = [seconds_of(source, device, rate_of_variant(variant.options)) for variant in recipe.variants]
    known = [seconds for seconds in every if seconds is not None]
    whole = len(known) == len(every) and bool(known)
    return dataclasses.replace(
        found,
        disk=found.disk + streams,
        ram=found.ram + min(streams, RAM_LIMIT),
        seconds=sum(known) if whole else None,
        basis="the sum of its variants: bench/RESULTS.md, docs/lab.md" if whole else found.basis,
    )


def rate_of_variant(options: object) -> str:
    """The type or method whose measured rate is a variant's."""
    if isinstance(options, GgufOptions):
        return find_mix(options.type).base
    return rate_of(options) if isinstance(options, WeightsOptions) else ""
