"""What `mmquant gguf` does: its options read and checked, its text, its dry run, its job (gguf_job.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import InputError
from mmquant.monitor import Monitor, watching

from ..calibration.gguf.run import Calibration, plan_memory
from ..calibration.gguf.run_stored import Stored, open_stored
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.parse import path_fault, short
from ..convert.gguf.mixes import PLAIN, find_mix, parse_overrides
from ..convert.gguf.plan import make_plan
from ..convert.gguf.variant import GgufVariant
from ..convert.hub.address import parse_address
from ..convert.naming import short_name
from .corpus import at_effort, check_texts, context_of, generic_at_most, say_if_short, windows_at_most
from .engine import run_jobs
from .gguf_job import GgufJob, run_of
from .gguf_plan import check_planned, nearest_mix, read_types
from .made import words_of
from .models import Model, choose_device, opened
from .needs import needs_of
from .options import GgufOptions
from .passes import Passes
from .place import check_place
from .plan_first import with_plan
from .results import Quantized, planned, written

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


def quantize_gguf(
    model: Model,
    out: str | Path,
    options: GgufOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write a GGUF file for llama.cpp into the folder `out`; `path` of the result is the (first) file.

    Types below 8 bits are calibrated in the same pass. A finished folder of the same run is left alone, an unfinished
    one continued. Arguments as of `quantize_fp8`.

    Raises InputError when model, text, type or `out` is not what is needed, FitError when memory or disk is too small.
    """
    chosen, out, place = options or GgufOptions(), Path(out), choose_device(device)
    check_options(chosen)
    with watching(monitor), opened(model, fetch, None if dry_run else out) as source:
        chosen = with_plan(source, chosen, out, place, dry_run)
        variant = variant_of(source, chosen, model)
        size = make_plan(source, variant, None).bytes
        if dry_run:
            needs = needs_of(source, out, size, place, find_mix(chosen.type).base)
            return planned(out, variant.label, needs, lambda: check_gguf(source, variant, out, size, place, chosen))
        job = make_job(source, chosen, out, Passes(source, place), variant)
        run_jobs([job])
        return written(job.path, job.label, size)


def variant_of(source: Checkpoint, options: GgufOptions, model: Model) -> GgufVariant:
    """The artifact to write; `model` names its file unless the options do."""
    found, mix, stem = read_types(options.plan), find_mix(options.type), options.name
    if found.plan is not None and options.plan is not None:
        check_planned(source, found.plan, options.plan)
        mix = nearest_mix(source, found.plan)
    if stem is None:
        end = mix.name if found.plan is None else "planned"
        stem = f"{model_stem(str(model) if isinstance(model, str | Path) else source.label)}-{end}"
    changed = parse_overrides(options.tensor_type)
    return GgufVariant(mix, stem, is_calibrated(options), changed, found.types, part_bytes=options.max_part_size)


def make_job(source: Checkpoint, options: GgufOptions, out: Path, passes: Passes, variant: GgufVariant) -> GgufJob:
    """The artifact as a job of `passes`' run; its text is read here."""
    calibration = make_calibration(source, options, passes) if variant.importance else None
    job = GgufJob(source, variant, out, calibration=calibration, device=passes.device, passes=passes)
    job.made = words_of("gguf", options)
    return job


def check_options(options: GgufOptions) -> None:
    """InputError for a type, an override, a plan or a name that is none."""
    find_mix(options.type)
    parse_overrides(options.tensor_type)
    read_types(options.plan)
    if options.name is not None:
        check_stem(options.name)


def is_calibrated(options: GgufOptions) -> bool:
    """Whether the type is one that calibration helps, and wanted."""
    return not options.no_calibration and find_mix(options.type).base not in (*PLAIN, "Q8_0")


def check_gguf(
    source: Checkpoint, variant: GgufVariant, out: Path, size: int, device: str, options: GgufOptions
) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, run_of(source, variant))
    if not variant.importance or options.statistics is not None:
        return
    check_texts(options)
    if options.effort != "fast":
        text = at_effort(options)
        plan_memory(source.geometry, windows_at_most(text), context_of(source, text), device)


def make_calibration(source: Checkpoint, options: GgufOptions, passes: Passes | None = None) -> Calibration | Stored:
    """Open the statistics, or read, check and pack the calibration text."""
    if options.statistics is not None:
        return open_stored(options.statistics, source, options.effort)
    corpus = (passes or Passes(source, "cpu")).corpus(at_effort(options))
    say_if_short(options, corpus)
    names = ", ".join(Path(spec.split("=")[0]).name for spec in options.text) or "default"
    names += " and bundled text" if generic_at_most(options) else ""
    return Calibration(corpus.tokens, {"corpus": corpus.describe()}, names, options.effort)


def check_stem(name: str) -> str:
    """A file's name without .gguf; InputError when it is no plain name, hidden, or too long for its parts' numbers."""
    whole = f"{name}-00001-of-00001.gguf"
    if not name or "/" in name or name.startswith(".") or path_fault(whole) or len(os.fsencode(whole)) > 240:
        raise InputError(f"--name {short(name)}: expected a plain file name without .gguf")
    return name


def model_stem(model: str) -> str:
    """The model's name in a file name: the last part of a hub name or path."""
    address = parse_address(model)
    return short_name(address.spec or model)
