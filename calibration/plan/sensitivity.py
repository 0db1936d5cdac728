"""What rounding each matrix to each type costs: measured once, kept in a file, interpolated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ...convert.files.atomic import write_whole
from ...convert.files.parse import parse_json, short, take, take_list, take_map

VERSION = 1
KEY = "mmquant_sensitivity"


@dataclass(frozen=True)
class Measured:
    """One matrix. error: by type, mean squared output error of a token; kld: by type, mean of every judged window."""

    error: dict[str, float]
    kld: dict[str, list[float]]

    def cost(self, kind: str) -> float:
        """KLD that the whole model gets from this matrix at `kind`, in nats a token."""
        if kind in self.kld:
            return _mean(self.kld[kind])
        known = sorted((self.error[probe], _mean(values)) for probe, values in self.kld.items())
        return interpolated(self.error[kind], [(e, k) for e, k in known if e > 0 and k > 0])


@dataclass(frozen=True)
class Sensitivity:
    """All matrices of a model by GGUF name, or a folder's units; on which model (fingerprint) and text, for what."""

    model: str
    text: dict[str, Any]
    judged: list[str]  # domain of every judged window
    groups: dict[str, Measured]
    format: str = "gguf"

    def to_dict(self) -> dict[str, Any]:
        """The document that `write` stores."""
        groups = {name: asdict(found) for name, found in self.groups.items()}
        head = {KEY: VERSION, "format": self.format, "model": self.model, "text": self.text}
        return {**head, "judged": self.judged, "groups": groups}

    def write(self, path: Path) -> None:
        """Store it as JSON; the file appears whole."""
        write_whole(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    def check(self, path: Path, model: str, form: str, kinds: Mapping[str, Sequence[str]]) -> None:
        """InputError unless it is of this model and format and has everything that a plan asks for, by group."""
        if self.model != model:
            raise InputError(f"{path}: measured on another model ({short(self.model)}), expected {model}")
        if self.format != form:
            raise InputError(f"{path}: measured for --format {short(self.format)}, expected {form}")
        for name, wanted in kinds.items():
            found = self.groups.get(name)
            missing = None if found is None else next((kind for kind in wanted if kind not in found.error), None)
            if found is None or not found.kld or missing:
                raise InputError(f"{path}: {name} has no {missing or 'measurement'}, expected one of every matrix")


def read_sensitivity(path: Path) -> Sensitivity:
    """What `Sensitivity.write` stored. InputError, naming the file, when it is anything else."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected what `mmquant plan` measured")
    where = str(path)
    document = parse_json(path.read_bytes(), where, unique=True)
    if document.get(KEY) != VERSION:
        raise InputError(f"{where}: {KEY} is {short(document.get(KEY))}, expected {VERSION}")
    judged = take_list(document, "judged", str, where)
    groups: dict[str, Measured] = {}
    for name, entry in take_map(document, "groups", dict, where).items():
        groups[name] = read_measured(entry, len(judged), f"{where}: {short(name)}")
    model, text = take(document, "model", str, where), take(document, "text", dict, where)
    return Sensitivity(model, text, judged, groups, take(document, "format", str, where, "gguf"))


def read_measured(entry: Mapping[str, Any], windows: int, where: str) -> Measured:
    """One matrix of a sensitivity file. InputError for numbers that are none, and KLDs of other windows."""
    error = take_map(entry, "error", float, where)
    kld = {
        kind: take_list(take(entry, "kld", dict, where), kind, float, where) for kind in take(entry, "kld", dict, where)
    }
    for kind, values in kld.items():
        if len(values) != windows or kind not in error:
            raise InputError(f"{where}: {len(values)} KLDs of {short(kind)}, expected {windows} and its error")
    if any(value < 0 for values in (error.values(), *kld.values()) for value in values):
        raise InputError(f"{where}: a negative error or KLD, expected 0 or more")
    return Measured({k: float(v) for k, v in error.items()}, {k: [float(v) for v in vs] for k, vs in kld.items()})


def interpolated(error: float, known: list[tuple[float, float]]) -> float:
    """KLD at an output error, from known (error, KLD) in rising order.

    Linear in the logarithms between them, in proportion below the least, with the last slope beyond the largest.
    """
    if not known or error <= 0:
        return 0.0
    least = known[0]
    if error <= least[0] or len(known) == 1:
        return least[1] * error / least[0]
    upper = next((i for i, (e, _) in enumerate(known) if e >= error and i), len(known) - 1)
    (e0, k0), (e1, k1) = known[upper - 1], known[upper]
    if e1 <= e0:
        return k1
    slope = min(2.0, max(0.25, math.log(k1 / k0) / math.log(e1 / e0)))
    return k1 * (error / e1) ** slope


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
