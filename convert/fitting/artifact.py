"""What is fitted: sizes of a model by its config.json or offline, bytes of a finished artifact by its headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmquant.errors import InputError, naming

from ..checkpoints.store import LocalFolder, ShardStore
from ..checkpoints.tensors import read_config
from ..files.parse import is_list, is_object, parse_json
from ..formats.skip_lists import MLX as MLX_LM
from ..formats.skip_lists import SGLANG, VLLM
from ..gguf.reader import GgufSource
from ..hub.address import parse_address
from ..hub.hubs import KEYS
from ..models import ARCHITECTURES, architecture_of
from ..models.geometry import Geometry
from ..open import DEMO, demo_folder, is_gguf, open_store
from .catalog import FOLDER, GGUF, MLX, Row
from .weights import Weights, by_kind

EXPERTS = (".experts.", ".switch_mlp.")  # of a layer; MLX stacks them
PLACED = {MLX_LM, SGLANG, VLLM}  # engines of folders that a fit knows
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
    with naming(model):
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


def read_artifact(name: str | Path) -> Artifact:
    """A folder, a GGUF file or a repository (hf:ORG/NAME[@REV][:TYPE]) by its headers. InputError when it is none."""
    address = parse_address(str(name))
    if address.spec is not None:
        return _repository(str(name), address.spec, address.kind)
    path = Path(name)
    if is_gguf(path):
        source = GgufSource(path)
        try:
            return _gguf(path.name, source, str(source.files[0].path))
        finally:
            source.close()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or GGUF file, expected a finished artifact")
    return _folder(path.name, LocalFolder(path), str(path))


def _repository(name: str, spec: str, kind: str | None) -> Artifact:
    from ..hub.gguf_headers import hub_gguf_headers
    from ..hub.store import hub_source

    store = hub_source(spec)
    try:
        files = store.files()
        if kind is None and "config.json" in files:
            return _folder(name, store, spec)
    finally:
        store.close()
    found, source = hub_gguf_headers(spec, kind)
    return _gguf(name, source, f"{spec}:{found}")


def _gguf(name: str, source: GgufSource, entry: str) -> Artifact:
    sizes = {name: tensor.size for file in source.files for name, tensor in file.tensors.items()}
    weights = by_kind(source.geometry.layers, sizes)
    row = Row(name, GGUF, "gguf", (), lambda _: weights)
    return Artifact(row, source.geometry, weights, "f16", entry, len(source.files))


def _folder(name: str, store: ShardStore, entry: str) -> Artifact:
    config = read_config(store)
    source = open_store(store)
    try:
        if source.book is not None and not (engines := set(source.book.engines)) & PLACED:
            runs = f"runs under {', '.join(engines)}"
            raise InputError(f"{name}: {runs}, expected an artifact for vLLM, SGLang, mlx_lm or llama.cpp")
        g = source.geometry
        weights = _by_layer(g, {tensor: info.size for tensor, info in source.tensors.items()})
    finally:
        source.close()
    quantization: object = config.get("quantization_config")
    mlx = "quantization" in config
    row = Row(name, MLX if mlx else FOLDER, "safetensors", (), lambda _: weights, _group(quantization))
    cache = "fp8" if is_object(quantization) and quantization.get("kv_cache_scheme") else "f16"
    return Artifact(row, g, weights, cache, entry)


def _by_layer(g: Geometry, sizes: dict[str, int]) -> Weights:
    experts, resident, names = [0] * g.layers, 0, g.names
    for name, size in sizes.items():
        layer = names.layer_of(name)
        if layer is not None and layer < g.layers and any(word in name for word in EXPERTS):
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
