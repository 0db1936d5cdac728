"""The plan of a folder as its variant has it: the kinds of every layer's experts and attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmquant.errors import InputError, suggest

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.kinds import ATTENTION, EXPERTS, Kind, group_name, plan_row
from ..convert.folder.unit_bytes import fixed_bytes, unit_specs
from ..convert.plan_file import PlanFile, read_plan_file
from .options import WeightsOptions


def planned_shape(source: Checkpoint, options: WeightsOptions, command: str, title: str) -> dict[str, Any]:
    """What --plan changes of a variant; nothing without. InputError for a plan of something else."""
    if options.plan is None:
        return {}
    units = read_units(source, options.plan, command, options.tp)
    layers = range(source.geometry.layers)
    kinds = tuple((units[group_name(layer, EXPERTS)], units[group_name(layer, ATTENTION)]) for layer in layers)
    shape: dict[str, Any] = {"kinds": kinds, "title": title, "attention": "bf16"}
    groups = [kind.group for pair in kinds for kind in pair if kind.calibrated]
    return shape | ({"group_size": max(groups)} if groups else {})


def read_units(source: Checkpoint, path: Path, command: str, parallel: int = 1) -> dict[str, Kind]:
    """The kind of every unit by its name. InputError, naming the file, unless they are this model's and load so."""
    made, g = read_plan_file(path), source.geometry
    if made.format != command:
        raise InputError(f"{path}: a plan for mmquant {made.format}, expected one for {command}")
    if made.model != source.fingerprint:
        raise InputError(f"{path}: planned for another model ({made.label[:60]}), expected one for {source.label}")
    row = plan_row(command)
    known = {kind.word: kind for unit in row.units.values() for kind in unit.kinds}
    expected = row.groups(g)
    for name in expected:
        if name not in made.tensors:
            raise InputError(f"{path}: {name} is missing, expected every unit of the model")
        if (word := made.tensors[name]) not in known:
            raise InputError(f"{path}: {name} is {word[:40]}; {suggest(word, known)}")
        if known[word] not in row.groups(g, parallel)[name]:
            raise InputError(f"{path}: {name} is {word}, which {parallel} devices would cut; plan with --tp {parallel}")
    if strange := next((name for name in made.tensors if name not in expected), None):
        raise InputError(f"{path}: {strange[:60]} is no unit of the model")
    check_bytes(source, path, made, command)
    return {name: known[made.tensors[name]] for name in expected}


def check_bytes(source: Checkpoint, path: Path, made: PlanFile, command: str) -> None:
    """InputError unless the units take the bytes that the plan says."""
    row = plan_row(command)
    size = fixed_bytes(source, row, headers=False)
    for name, word in made.tensors.items():
        kind = next(kind for unit in row.units.values() for kind in unit.kinds if kind.word == word)
        size += sum(count * sum(s.bytes for s in specs) for count, specs in unit_specs(source, row, name, kind))
    if size != made.bytes:
        raise InputError(f"{path}: says {made.bytes:,} bytes, its types take {size:,}: it was changed by hand")
