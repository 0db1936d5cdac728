"""plan.json: the type of every matrix of an artifact, what it is predicted to cost, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from .files.atomic import write_whole
from .files.parse import parse_json, short, take, take_list, take_map

KEY, VERSION = "mmquant_plan", 1
FORMATS = ("gguf", "int4", "nvfp4", "mxfp4", "mlx")


@dataclass(frozen=True)
class Reason:
    """Of one matrix: its bytes and predicted KLD, and the next smaller and larger type with theirs."""

    bytes: int
    kld: float
    smaller: dict[str, Any] | None = None  # type, bytes, kld
    larger: dict[str, Any] | None = None


@dataclass(frozen=True)
class Point:
    """One alternative: bytes of all tensors and the predicted KLD."""

    bytes: int
    kld: float


@dataclass(frozen=True)
class PlanFile:
    """A plan.

    format   gguf, or the command that writes the folder
    model    fingerprint of the weights that it was measured on; label: their name
    asked    what was asked for: size, bits or target
    bytes    of all tensors' data (headers and padding are not counted); kld: predicted mean KLD in nats
    tensors  name -> type, of every matrix (GGUF), or unit -> kind (layers.3.experts -> int4-g32); reasons: why, by name
    curve    other budgets and what they would give
    placement of a target: n_cpu_moe, or tensor_parallel
    """

    format: str
    model: str
    label: str
    asked: dict[str, Any]
    bytes: int
    bits_per_weight: float
    kld: float
    tensors: dict[str, str]
    reasons: dict[str, Reason] = field(default_factory=dict[str, Reason])
    curve: tuple[Point, ...] = ()
    placement: dict[str, int] | None = None
    text: str = ""  # fingerprint of the calibration text

    def to_dict(self) -> dict[str, Any]:
        """The document of plan.json."""
        fields = asdict(self)
        why, points = fields.pop("reasons"), fields.pop("curve")
        return {KEY: VERSION, **fields, "curve": list(points), "reasons": why}

    def write(self, path: Path) -> None:
        """Store it; the file appears whole."""
        write_whole(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def read_plan_file(path: Path) -> PlanFile:
    """A plan.json. InputError, naming the file and the place, for anything else."""
    where = str(path)
    if not path.is_file():
        raise InputError(f"{where}: no such file, expected a plan.json of `mmquant plan`")
    return parse_plan(parse_json(path.read_bytes(), where, unique=True), where)


def parse_plan(document: dict[str, Any], where: str) -> PlanFile:
    """The plan in a parsed document. InputError."""
    if document.get(KEY) != VERSION:
        raise InputError(f"{where}: {KEY} is {short(document.get(KEY))}, expected {VERSION}")
    kind = take(document, "format", str, where)
    if kind not in FORMATS:
        raise InputError(f"{where}: format {short(kind)}, expected {' or '.join(FORMATS)}")
    reasons = {
        name: Reason(
            take(entry, "bytes", int, f"{where}: {short(name)}"),
            take(entry, "kld", float, f"{where}: {short(name)}"),
            take(entry, "smaller", dict, f"{where}: {short(name)}", None),
            take(entry, "larger", dict, f"{where}: {short(name)}", None),
        )
        for name, entry in _reasons(document, where).items()
    }
    curve = tuple(
        Point(take(p, "bytes", int, where), take(p, "kld", float, where))
        for p in take_list(document, "curve", dict, where, [])
    )
    placement = None if document.get("placement") is None else take_map(document, "placement", int, where)
    return PlanFile(
        kind,
        take(document, "model", str, where),
        take(document, "label", str, where),
        take(document, "asked", dict, where),
        take(document, "bytes", int, where),
        take(document, "bits_per_weight", float, where),
        take(document, "kld", float, where),
        take_map(document, "tensors", str, where),
        reasons,
        curve,
        placement,
        take(document, "text", str, where, ""),
    )


def _reasons(document: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    return {} if document.get("reasons") is None else take_map(document, "reasons", dict, where)
