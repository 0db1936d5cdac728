"""The plan of a GGUF run: a file of types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmquant.errors import InputError

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.parse import parse_json
from ..convert.gguf.mixes import MIXES, PLAIN, Mix, data_bytes, tensor_types
from ..convert.gguf.names import all_shapes, is_quantizable
from ..convert.plan_file import KEY, PlanFile, parse_plan


@dataclass(frozen=True)
class Types:
    """Types by tensor name; plan: where they come from, when `mmquant plan` made it."""

    types: dict[str, str] | None
    plan: PlanFile | None = None


def read_types(path: Path | None) -> Types:
    """What --plan names; InputError when it is not types by tensor name."""
    if path is None:
        return Types(None)
    if not path.is_file():
        raise InputError(f"--plan {path}: no such file, expected types by tensor name")
    document = parse_json(path.read_bytes(), str(path), unique=True)
    if KEY in document:
        made = parse_plan(document, str(path))
        return Types(made.tensors, made)
    types = document.get("tensors", document)
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise InputError(f"{path}: expected an object of tensor names and types")
    return Types(types)


def check_planned(source: Checkpoint, made: PlanFile, path: Path) -> None:
    """InputError unless a plan is of this model and names every matrix, with the bytes that it says."""
    if made.format != "gguf":
        raise InputError(f"{path}: a plan for mmquant {made.format}, expected one for gguf")
    if made.model != source.fingerprint:
        raise InputError(f"{path}: planned for another model ({made.label[:60]}), expected one for {source.label}")
    shapes = all_shapes(source.geometry)
    chosen = {name for name, shape in shapes.items() if is_quantizable(name, shape)}
    missing = sorted(chosen - made.tensors.keys())
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing ({len(missing)} of {len(chosen)}), expected every matrix")
    size = data_bytes(source.geometry, made.tensors)
    if size != made.bytes:
        raise InputError(f"{path}: says {made.bytes:,} bytes, its types take {size:,}: it was changed by hand")


def nearest_mix(source: Checkpoint, made: PlanFile) -> Mix:
    """The stock mix whose size is nearest: what general.file_type says of a planned file."""
    g = source.geometry

    def distance(mix: Mix) -> int:
        return abs(data_bytes(g, tensor_types(mix, g)) - made.bytes)

    return min((mix for mix in MIXES.values() if mix.base not in (*PLAIN, "Q8_0", "MXFP4")), key=distance)
