"""Write a GGUF file (or its parts) in one pass over a checkpoint: headers, layer by layer, manifest last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmquant.errors import InputError
from mmquant.monitor import current, phase

from ..calibration.gguf.encode import encode_tensors
from ..calibration.gguf.run import CalibratedRun, Calibration, plan_memory
from ..calibration.gguf.run_fast import FastRun
from ..calibration.gguf.run_stored import Stored, open_stored, stored_tensors
from ..calibration.gguf.solve import Report
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import write_whole
from ..convert.files.parse import parse_json, path_fault, short
from ..convert.gguf.doctor import check_metadata
from ..convert.gguf.reader import GgufSource
from ..convert.gguf.variant import GgufVariant
from ..convert.gguf.writer import GgufWriter, TensorInfo
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
    run = {**variant.run(), "source": source.fingerprint, "part_bytes": variant.part_bytes}
    run |= calibration.run() if calibration else {}
    parts = variant.parts(source, calibration.importance(source.geometry) if calibration else None)
    first = out / parts[0].name
    if is_finished(out, run):
        return first
    check_memory(source, calibration, device)
    with claim(out, run):
        check_disk(out, sum(part.bytes for part in parts) - written_bytes(out), source)
        writer = GgufWriter(out, parts, run)
        if isinstance(calibration, Calibration) and calibration.effort != "fast":
            CalibratedRun(source, variant, writer, calibration, device).write()
        else:
            write_steps(source, variant, writer, device, calibration)
        paths = writer.finish()
        entries = [FileEntry(p.name, p.stat().st_size, writer.sha256[p.name]) for p in paths]
        entries += carry_licence(source, out)
        check_file(first)
        weights = variant.weights(source.geometry)
        finish_folder(out, source, "gguf", variant.label, tuple(entries), weights, run, entry=first.name)
        for leftover in out.glob(".hidden-*"):
            leftover.unlink()
        writer.clear_progress()
    return first


def check_file(first: Path) -> None:
    """InputError unless the set is whole and its metadata makes runtimes work; the writer has seen every scale."""
    found = GgufSource(first)
    found.validate()
    for finding in check_metadata(found):
        if finding.level == "error":
            raise InputError(f"{first}: {finding.where} is {finding.text}")


def check_memory(source: Checkpoint, calibration: Calibration | Stored | None, device: torch.device | str) -> None:
    """FitError before anything is written, when a calibrated layer needs more memory than is free."""
    if isinstance(calibration, Calibration) and calibration.effort != "fast":
        windows, length = calibration.tokens.shape
        plan_memory(source.geometry, windows, length, device)


def check_gguf(
    source: Checkpoint,
    variant: GgufVariant,
    out: Path,
    size: int,
    device: str,
    options: dict[str, Any],
) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, {**variant.run(), "source": source.fingerprint, "part_bytes": variant.part_bytes})
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


def write_steps(
    source: Checkpoint,
    variant: GgufVariant,
    writer: GgufWriter,
    device: torch.device | str,
    calibration: Calibration | Stored | None,
) -> None:
    """Everything that is still missing, a checkpoint after every step; at most one stream of text goes along."""
    steps = variant.steps(source.geometry)
    ends = [sum(len(step) for step in steps[: index + 1]) for index in range(len(steps))]
    first = next((index for index, end in enumerate(ends) if end > writer.done), len(steps))
    make, report = maker(source, writer.folder, device, calibration)
    with phase(variant.label, len(steps), "step", first) as bar:
        for step in range(first, len(steps)):
            missing = steps[step][writer.done - (ends[step] - len(steps[step])) :]
            with memory_for(step_name(step, source.geometry.layers)):
                for name, data in make(missing):
                    writer.write(name, data)
            writer.checkpoint()
            for line in report.of_layer(step - 1):
                current().message(line)
            bar.advance()


Make = Callable[[list[TensorInfo]], Iterable[tuple[str, np.ndarray]]]


def maker(
    source: Checkpoint, folder: Path, device: torch.device | str, calibration: Calibration | Stored | None
) -> tuple[Make, Report]:
    """What makes the bytes of one step's tensors, and its report."""
    if isinstance(calibration, Calibration):
        fast = FastRun(source, calibration.tokens, device, folder)
        return fast.tensors, fast.report
    report = Report()
    if calibration is None:
        return lambda missing: encode_tensors(source, missing, device), report
    return lambda missing: stored_tensors(source, calibration, missing, device, report), report


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
