"""Write a GGUF file (or its parts) in one pass over a checkpoint: headers, layer by layer, manifest last."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from mmquant.errors import InputError
from mmquant.monitor import current, phase

from ..calibration.gguf.provider import TensorProvider
from ..calibration.gguf.run import CalibratedRun, Calibration, plan_memory
from ..calibration.gguf.run_fast import FastRun
from ..calibration.gguf.run_nearest import NearestRun
from ..calibration.gguf.run_stored import Stored, StoredRun, open_stored
from ..calibration.model.stream import forget
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import write_whole
from ..convert.files.parse import parse_json, path_fault, short
from ..convert.files.progress import damaged
from ..convert.gguf.doctor import check_metadata
from ..convert.gguf.plan import GgufPlan, make_plan
from ..convert.gguf.reader import GgufSource
from ..convert.gguf.variant import GgufVariant
from ..convert.gguf.writer import GgufWriter
from ..convert.hub.address import parse_address
from ..convert.manifest import FileEntry
from ..convert.naming import short_name
from ..convert.source import CARRIED_FILES
from .calibrate import context_of, generic_at_most, make_corpus, windows_at_most
from .folder import check_disk, check_place, claim, finish_folder, is_finished, step_name, written_bytes
from .memory import memory_for

HIGH = 4  # times as many windows with --effort high


def write_gguf(
    source: Checkpoint,
    variant: GgufVariant,
    out: Path,
    *,
    calibration: Calibration | Stored | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write `variant` of `source` into the folder `out`; returns the file to give to llama.cpp (the first part).

    With `calibration` its text or its stored statistics steer the codes; without, every weight goes to the nearest
    point.

    A finished folder of the same run is left alone, an unfinished one continued at its layer. InputError when `out`
    holds something else, FitError when the disk is too small.
    """
    source.validate()
    plan = make_plan(source, variant, calibration.importance(source.geometry) if calibration else None)
    run = run_of(source, variant) | (calibration.run() if calibration else {})
    first = out / plan.parts[0].name
    if is_finished(out, run):
        return first
    provider = provider_of(source, plan, calibration, device, out)
    with claim(out, run):
        check_disk(out, plan.bytes - written_bytes(out), source)
        writer = GgufWriter(out, plan.parts, run)
        write_steps(plan, writer, provider)
        paths = writer.finish()
        entries = [FileEntry(p.name, p.stat().st_size, writer.sha256[p.name]) for p in paths]
        entries += carry_licence(source, out)
        check_file(first)
        finish_folder(out, source, "gguf", plan.label, tuple(entries), plan.weights(), run, entry=first.name)
        forget(out)
        writer.clear_progress()
    return first


def run_of(source: Checkpoint, variant: GgufVariant) -> dict[str, Any]:
    """Everything that decides the bytes, apart from the calibration."""
    return {**variant.run(), "source": source.fingerprint, "part_bytes": variant.part_bytes}


def provider_of(
    source: Checkpoint, plan: GgufPlan, calibration: Calibration | Stored | None, device: torch.device | str, out: Path
) -> TensorProvider:
    """What makes the tensors of `plan`. FitError, before anything is written, when a layer needs more memory than is
    free.
    """
    if calibration is None:
        return NearestRun(source, plan, device)
    if isinstance(calibration, Stored):
        return StoredRun(source, plan, calibration, device)
    if calibration.effort == "fast":
        return FastRun(source, plan, calibration.tokens, device, out)
    return CalibratedRun(source, plan, calibration, device, out)


def write_steps(plan: GgufPlan, writer: GgufWriter, provider: TensorProvider) -> None:
    """Write every step that is missing, each made durable before the next begins."""
    first, steps = plan.first_step(writer.done), len(plan.steps)
    if first is None:
        raise damaged(writer.progress.path, f"{writer.done} tensors are done", "whole steps")
    provider.begin(first)
    with phase(plan.label, steps, "step", first) as bar:
        for step in range(first, steps):
            with memory_for(step_name(step, steps - 2)):
                for name, data in provider.tensors(step):
                    writer.write(name, data)
            provider.save(step + 1)
            writer.checkpoint()
            provider.forget(step)
            for line in provider.report.of_layer(step - 1):
                current().message(line)
            bar.advance()


def check_file(first: Path) -> None:
    """InputError unless the set is whole and its metadata makes runtimes work; the writer has seen every scale."""
    found = GgufSource(first)
    found.validate()
    for finding in check_metadata(found):
        if finding.level == "error":
            raise InputError(f"{first}: {finding.where} is {finding.text}")


def check_gguf(
    source: Checkpoint, variant: GgufVariant, out: Path, size: int, device: str, options: dict[str, Any]
) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, run_of(source, variant))
    if options["calibrated"] and options["effort"] != "fast":
        options = at_effort(options, options["effort"])
        plan_memory(source.geometry, windows_at_most(options), context_of(source, options), device)


def carry_licence(source: Checkpoint, out: Path) -> list[FileEntry]:
    """Licence and notice files beside the model, byte for byte (everything else that engines need is in the GGUF)."""
    entries = []
    for name in (name for name in CARRIED_FILES if name.startswith(("LICENSE", "NOTICE"))):
        data = source.small_file(name)
        if data is not None:
            write_whole(out / name, data)
            entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return entries


def at_effort(text: dict[str, Any], effort: str) -> dict[str, Any]:
    """The text's options; high effort reads HIGH times as many windows."""
    return text | {"windows": int(text["windows"]) * (HIGH if effort == "high" else 1)}


def make_calibration(
    source: Checkpoint, effort: str, statistics: Path | None, text: dict[str, Any]
) -> Calibration | Stored:
    """Open the statistics, or read, check and pack the calibration text."""
    if statistics is not None:
        return open_stored(statistics, source, effort)
    text = at_effort(text, effort)
    corpus = make_corpus(source, {"evaluation": (), **text})
    names = ", ".join(Path(spec.split("=")[0]).name for spec in text["texts"]) or "default"
    names += " and bundled text" if generic_at_most(text) else ""
    return Calibration(corpus.tokens, {"corpus": corpus.describe()}, names, effort)


def read_plan(path: Path | None) -> dict[str, str] | None:
    """Types by tensor name of a plan file; InputError when it is not one."""
    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"--plan {path}: no such file, expected types by tensor name")
    document = parse_json(path.read_bytes(), str(path), unique=True)
    types = document.get("tensors", document)
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise InputError(f"{path}: expected an object of tensor names and types")
    return types


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
