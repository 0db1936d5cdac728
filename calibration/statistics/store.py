"""Statistics on disk: one safetensors file per layer, and statistics.json with their identity.

Second moments are stored as upper triangles, row by row [E, n(n+1)/2], float32 or bfloat16. statistics.json is written
after every layer: the layers that it lists are whole.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mmquant.errors import InputError

from ...convert.checkpoints.write import write_tensors
from ...convert.files.atomic import is_temporary, sha256_file, whole_file, write_whole
from ...convert.files.difference import first_difference, short
from ...convert.files.progress import damaged
from ...convert.models.geometry import Geometry
from ...quantize.moments import Moments
from ..model.distributed import world
from .file import SHARED, SQUARES, entries
from .layer import MOMENT_FIELDS, MOMENT_SETS, ROUTING_FIELDS, LayerStatistics, RoutingStatistics
from .triangles import STORED, square

MANIFEST = "statistics.json"
OTHER_WAYS = "choose another folder or start over with --fresh"
FORMAT = 2  # 2: with the extremes of keys and values
REMEDY = "delete the folder (or use --fresh) and calibrate again"


def layer_file(layer: int) -> str:
    """Name of a layer's file."""
    return f"layer-{layer:03d}.safetensors"


class StatisticsWriter:
    """Writes layer after layer into `folder`; opened again on the same identity it continues behind the last one.

    With several ranks every rank calls `write`: rank 0 writes, the owners of the experts send it their moments.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], label: str, dtype: str = "float32") -> None:
        """label: the model. Raises ValueError when the folder holds another run's statistics or other files."""
        if dtype not in STORED:
            raise InputError(f"dtype {dtype!r}, expected one of {', '.join(STORED)}")
        self.folder, self.label, self.dtype = folder, label, dtype
        self.identity = {**json.loads(json.dumps(identity)), "stored": dtype}
        self.layers: list[dict[str, Any]] = []
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file, expected a folder or nothing")
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)
            if found["identity"] != self.identity:
                what = first_difference(found["identity"], self.identity)
                raise InputError(f"{folder}: holds statistics of another run: {what}; {OTHER_WAYS}")
            self.layers = found["layers"]
            for entry in self.layers:
                check_size(folder, entry)
            return
        strange = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
        strange = sorted(name for name in strange if not is_temporary(name))
        if strange:
            raise InputError(f"{folder}: holds {strange[0]}, expected an empty folder or unfinished statistics")

    @property
    def done(self) -> int:
        """Layers that are whole; the next one to write."""
        return len(self.layers)

    def write(self, found: LayerStatistics) -> None:
        """Write the next layer and only then its file."""
        rank, _ = world()
        path = self.folder / layer_file(found.layer)
        parts = list(entries(found, self.dtype))
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                digest = write_tensors(file, parts)
            size = path.stat().st_size
            self.layers.append({"layer": found.layer, "file": path.name, "bytes": size, "sha256": digest})
        else:
            for entry in parts:
                for _ in entry.values():
                    pass
            self.layers.append({"layer": found.layer})

    def commit(self) -> None:
        """Write statistics.json: from here on the layers written so far count."""
        if world()[0] == 0:
            data = {"format": FORMAT, "model": self.label, "identity": self.identity, "layers": self.layers}
            write_whole(self.folder / MANIFEST, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """statistics.json, checked. Raises ValueError when it is missing or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}, expected a folder written by mmquant calibrate")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise damaged(path, "not JSON", "statistics of mmquant calibrate", REMEDY) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: format {found!r}, expected {FORMAT}")
    layers = data.get("layers")
    if not isinstance(layers, list) or not all(_is_entry(number, entry) for number, entry in enumerate(layers)):
        raise damaged(path, f"layers {short(layers)}", "a file, its bytes and its SHA-256 for each layer", REMEDY)
    identity = data.get("identity")
    kinds = {"model": str, "corpus": dict, "collect": dict}
    if not isinstance(identity, dict) or any(not isinstance(identity.get(key), kinds[key]) for key in kinds):
        raise damaged(path, f"identity {short(identity)}", "model, corpus and collect", REMEDY)
    corpus, collect = identity["corpus"], identity["collect"]
    if not isinstance(corpus.get("fingerprint"), str) or not isinstance(collect.get("full"), bool):
        raise damaged(path, "no fingerprint of the corpus, or not what was collected", "both", REMEDY)
    return data


def _is_entry(number: int, entry: object) -> bool:
    """Whether an entry of statistics.json is that of layer `number`."""
    if not isinstance(entry, dict) or entry.get("layer") != number or entry.get("file") != layer_file(number):
        return False
    return type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def check_size(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The file of a layer, whose size is as recorded; InputError otherwise."""
    path = folder / entry["file"]
    size = path.stat().st_size if path.is_file() else "no file"
    if size != entry["bytes"]:
        raise damaged(path, str(size), f"{entry['bytes']} bytes as they were written", REMEDY)
    return path


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics in a folder, opened from statistics.json alone."""

    folder: Path
    label: str
    identity: dict[str, Any]
    entries: tuple[dict[str, Any], ...]
    _checked: set[int] = field(default_factory=set, compare=False, repr=False)  # layers whose SHA-256 was compared

    def _path(self, layer: int) -> Path:
        """The file of a layer; its bytes are held against its SHA-256 when it is used for the first time."""
        entry = self.entries[layer]
        path = check_size(self.folder, entry)
        if layer not in self._checked:
            digest = sha256_file(path)
            if digest != entry["sha256"]:
                raise damaged(path, f"SHA-256 {digest[:16]}", f"{entry['sha256'][:16]} as it was written", REMEDY)
            self._checked.add(layer)
        return path

    @property
    def layers(self) -> int:
        """How many layers are stored."""
        return len(self.entries)

    @property
    def full(self) -> bool:
        """Whether second moments are there, not only diagonals."""
        return bool(self.identity["collect"]["full"])

    def check(self, fingerprint: str, layers: int | None = None, corpus: str | None = None) -> None:
        """Raise ValueError unless they are of this checkpoint (and corpus), and whole."""
        model = self.identity["model"]
        if model != fingerprint:
            raise InputError(
                f"{self.folder}: statistics of another checkpoint ({self.label}, fingerprint {model[:12]}), "
                f"expected fingerprint {fingerprint[:12]}"
            )
        found = self.identity["corpus"]["fingerprint"]
        if corpus is not None and found != corpus:
            raise InputError(f"{self.folder}: statistics of another corpus ({found[:12]}), expected {corpus[:12]}")
        if layers is not None and self.layers < layers:
            raise InputError(
                f"{self.folder}: {self.layers} of {layers} layers; run mmquant calibrate again to finish them"
            )

    def squares(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """|S|_F^2 [E] of the second moments of the inputs of gate/up and of down; None when only diagonals are kept."""
        if not self.full:
            return None
        with safe_open(self._path(layer), framework="pt") as file:
            first, second = (file.get_tensor(f"{name}.{SQUARES}") for name in ("expert_in", "expert_mid"))
        return first, second

    def layer(self, layer: int, second: bool = True) -> LayerStatistics:
        """One layer's statistics on the CPU; `second` False leaves full moments on disk."""
        if layer >= self.layers:
            raise InputError(f"{self.folder}: {self.layers} layers, no layer {layer}")
        with safe_open(self._path(layer), framework="pt") as file:
            names = set(file.keys())
            sets = {name: _read_moments(file, names, name, second) for name in MOMENT_SETS}
            routing = RoutingStatistics(*(file.get_tensor(f"routing.{field}") for field in ROUTING_FIELDS))
            amax = {name: file.get_tensor(name) for name in ("hidden_amax", "mid_amax", "kv_amax")}
        return LayerStatistics(layer=layer, **sets, routing=routing, **amax)


def _read_moments(file: safe_open, names: set[str], name: str, second: bool) -> Moments:
    values = {f: file.get_tensor(f"{name}.{f}") for f in MOMENT_FIELDS if f != "second"}
    inputs, whole = values["diagonal"].shape[1], None
    if second and f"{name}.second" in names:
        whole = square(file.get_tensor(f"{name}.second"), inputs)
    elif second and f"{name}.second.{SHARED}" in names:
        one = square(file.get_tensor(f"{name}.second.{SHARED}"), inputs)
        whole = one.expand(len(values["diagonal"]), -1, -1)
    return Moments(second=whole, **values)


def open_statistics(folder: str | Path) -> StoredStatistics:
    """Open what `mmquant calibrate --out` wrote: `layer(number)` reads the sums of one layer.

    Raises InputError when it is not such a folder.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            f"{folder}: a file, expected the folder of `mmquant calibrate --out` (an imatrix serves gguf --effort fast)"
        )
    data = read_manifest(folder)
    return StoredStatistics(folder, str(data.get("model")), data["identity"], tuple(data["layers"]))


def identity_of(
    fingerprint: str, geometry: Geometry, corpus: Mapping[str, Any], collect: object, **settings: object
) -> dict[str, Any]:
    """What decides the statistics' bits: model, text, what is collected and how it is computed."""
    return {
        "model": fingerprint,
        "geometry": dataclasses.asdict(geometry),
        "corpus": dict(corpus),
        "collect": dataclasses.asdict(collect),  # type: ignore[call-overload]
        **settings,
    }
