"""Read a folder back with compressed-tensors itself, by the folder's own config.json."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils.match import is_match

from .paths import GOLDEN

CACHE = ("k_scale", "v_scale")
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
PARTS += ("input_global_scale",)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards, as stored."""
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def copy_of(name: str, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A golden folder with its config and tensors changed."""
    shutil.copytree(GOLDEN / name, target)
    config, tensors = json.loads((target / "config.json").read_text()), tensors_of(target)
    change(config, tensors)
    (target / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
    return target


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def scheme_of(config: QuantizationConfig, module: str) -> QuantizationScheme | None:
    """The first config group that targets the module, None when it is ignored or not targeted."""
    linear = torch.nn.Linear(1, 1, device="meta")
    if any(is_match(module, linear, target) for target in config.ignore or []):
        return None
    for scheme in config.config_groups.values():
        assert isinstance(scheme, QuantizationScheme)
        if any(is_match(module, linear, target) for target in scheme.targets):
            return scheme
    return None


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Release name -> float32 weight of every matrix, by compressed-tensors' decompressor where config.json says so.

    Scales are handed over in float32, else the decompressor would round every product to the scales' bfloat16.
    """
    stored = tensors_of(folder)
    config = QuantizationConfig.model_validate(quantization_config(folder))
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    weights: dict[str, Tensor] = {}
    for module, parts in modules.items():
        scheme = scheme_of(config, module)
        if scheme is None or not {"weight_scale"} & set(parts):
            weights |= {f"{module}.{part}": tensor.float() for part, tensor in parts.items()}
            continue
        parts = {part: tensor for part, tensor in parts.items() if part not in CACHE}
        assert set(parts) <= set(PARTS), (module, sorted(parts))
        given: dict[str, Tensor | None] = {
            part: tensor.float() if part == "weight_scale" else tensor for part, tensor in parts.items()
        }
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format or config.format))
        weight = compressor.decompress(given, scheme)["weight"]
        assert weight is not None
        weights[module + ".weight"] = weight.float()
    return weights
