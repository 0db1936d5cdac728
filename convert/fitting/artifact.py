"""What is fitted: sizes of a model by its config.json or offline, bytes of a finished artifact by its headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError

from ..checkpoints.store import LocalFolder
from ..checkpoints.tensors import read_config
from ..files.parse import is_list, is_object, parse_json
from ..gguf.reader import GgufSource
from ..hub.address import parse_address
from ..hub.hubs import KEYS
from ..models import ARCHITECTURES, architecture_of
from ..models.geometry import Geometry
from ..open import DEMO, demo_folder, is_gguf, open_store
from .catalog import FOLDER, GGUF, MLX, Row
from .weights import Weights, by_kind

TILE = 128  # of FP8 without a block structure in its config.json


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. cache: the type that its config.json makes engines take; parts: files of a split GGUF."""

    row: Row
    geometry: Geometry
    weights: Weights
    cache: str = "f16"
    entry: str = "."
    parts: int = 1


def known_offline(model: str) -> Geometry | None:
    """Sizes of a release that is known without a network; None for a revision, a folder and everything else."""
    name = model.partition(":")[2] if model.partition(":")[0].lower() in KEYS.split("|") else model
    for row in ARCHITECTURES.values():
        if (config := row.releases.get(name)) is not None and not Path(model).exists():
            return row.geometry(config)
    return None


def geometry_of(model: str) -> Geometry:
    """Sizes of --model: offline for a known release, else by config.json of a folder, a file or a hub's repository."""
    if (known := known_offline(model)) is not None:
        return known
    config = _config(model)
    return architecture_of(config).geometry(config)


def _config(model: str) -> dict[str, Any]:
    if model == DEMO:
        return read_config(LocalFolder(demo_folder(), DEMO))
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        found = parse_json(path.read_bytes(), model)
        return found
    spec = parse_address(model).spec
    if spec is None:
        return read_config(LocalFolder(path))
    from ..hub.store import hub_source

    store = hub_source(spec)
    try:
        return read_config(store)
    finally:
        store.close()


def read_artifact(path: Path) -> Artifact:
    """A folder or GGUF file by its headers. InputError when it is none."""
    return _gguf(path) if is_gguf(path) else _folder(path)


def _gguf(path: Path) -> Artifact:
    source = GgufSource(path)
    try:
        sizes = {name: tensor.size for file in source.files for name, tensor in file.tensors.items()}
        weights = by_kind(source.geometry.layers, sizes)
        row = Row(path.name, GGUF, "gguf", (), lambda _: weights)
        return Artifact(row, source.geometry, weights, "f16", str(source.files[0].path), len(source.files))
    finally:
        source.close()


def _folder(path: Path) -> Artifact:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or GGUF file, expected a finished artifact")
    config = read_config(LocalFolder(path))
    source = open_store(LocalFolder(path))
    try:
        g = source.geometry
        weights = _by_layer(g, {name: tensor.size for name, tensor in source.tensors.items()})
    finally:
        source.close()
    quantization: object = config.get("quantization_config")
    mlx = "quantization" in config
    row = Row(path.name, MLX if mlx else FOLDER, "safetensors", (), lambda _: weights, _group(quantization))
    cache = "fp8" if is_object(quantization) and quantization.get("kv_cache_scheme") else "f16"
    return Artifact(row, g, weights, cache, str(path))


def _by_layer(g: Geometry, sizes: dict[str, int]) -> Weights:
    experts, resident, names = [0] * g.layers, 0, g.names
    for name, size in sizes.items():
        layer = names.layer_of(name)
        if layer is not None and layer < g.layers and ".experts." in name:
            experts[layer] += size
        else:
            resident += size
    return Weights(resident, tuple(experts), sizes.get(names.embed, 0), sizes.get(names.head, 0))


def _group(quantization: object) -> int:
    """The largest group or tile of inputs that a quantization_config names; 0: none."""
    found = [value for value in _values(quantization) if value > 0]
    return max(found, default=0)


def _values(value: object) -> Iterator[int]:
    if is_object(value):
        for key, inner in value.items():
            if key == "group_size" and isinstance(inner, int):
                yield inner
            elif key in ("block_structure", "weight_block_size") and is_list(inner) and len(inner) == 2:
                yield inner[1] if isinstance(inner[1], int) else TILE
            elif key != "input_activations":
                yield from _values(inner)
    elif is_list(value):
        for inner in value:
            yield from _values(inner)
