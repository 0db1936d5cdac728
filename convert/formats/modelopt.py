"""ModelOpt NVFP4: what NVIDIA's tool writes. E2M1 codes, an E4M3 scale per 16 inputs, one factor for the matrix.

`weight` U8 [O, I/2], the even input in the low nibble; `weight_scale` F8_E4M3 [O, I/16]; `weight_scale_2` F32 scalar: a
weight is code * scale * factor. With FP4 activations `input_scale` F32 scalar: the largest input over 448 * 6. The
quant_algo W4A16_NVFP4 quantizes weights only. Excluded modules are names, parts of names (vLLM) or wildcards.
Source: vLLM modelopt.py, SGLang modelopt_quant.py (is_layer_excluded).
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from mmquant.errors import InputError

from ...quantize.fp4.grid import NVFP4
from ...quantize.integer.grid import IntWeight
from ..files.parse import is_object, short
from ..models.names import TensorNames
from .format import BlockScales, Fetch, Format, Method, Part, Scheme, Shape
from .nvfp4 import GROUP, LARGEST, block_parts, block_values, blocks_of, positive, stored_scales
from .scales import finite
from .skip_lists import SGLANG, strings

NAME = "modelopt"
ALGORITHMS = {4: "NVFP4", 16: "W4A16_NVFP4"}  # by bits of the activations
ATTENTION = "*.self_attn.*"


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    parts = [*block_parts("weight", shape), Part("weight_scale_2", (), ("F32",), single=True)]
    return [*parts, Part("input_scale", (), ("F32",), needed=False)] if scheme.activations == 4 else parts


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    return block_values(fetch("weight"), finite(fetch, "weight_scale"), positive(fetch, "weight_scale_2"), shape)


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    packed, scales, unit = blocks_of(weight)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": unit}


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del scheme
    return _pack(names, NVFP4.round_nearest(weights, None))


def _block_scales(fetch: Fetch) -> BlockScales:
    return stored_scales(fetch("weight"), fetch("weight_scale"), fetch("weight_scale_2"))


def _input_scale(largest: Tensor) -> dict[str, Tensor]:
    return {"input_scale": largest / LARGEST}


def _config(scheme: Scheme, attention: bool, names: TensorNames) -> dict[str, Any]:
    four: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
    group = {"input_activations": four if scheme.activations == 4 else None, "weights": four, "targets": ["Linear"]}
    return {
        "quant_method": NAME,
        "quant_algo": ALGORITHMS[scheme.activations],
        "group_size": GROUP,
        "ignore": ["lm_head", f"*.{names.router}", *([] if attention else [ATTENTION])],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
    }


def _files(quantization: dict[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json, which TensorRT-LLM reads. Readers take it by the producer's name only."""
    said = {
        "quant_algo": quantization["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": quantization["group_size"],
        "exclude_modules": quantization["ignore"],
    }
    return {"hf_quant_config.json": {"producer": {"name": NAME, "version": "mmquant"}, "quantization": said}}


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    said = quantization.get("quantization")  # the older form of the same keys
    settings = said if is_object(said) else quantization
    algorithm = str(settings.get("quant_algo")).upper()
    if algorithm not in ALGORITHMS.values():
        raise InputError(
            f"config.json: quant_algo is {short(settings.get('quant_algo'))}, expected NVFP4 or W4A16_NVFP4"
        )
    key = "ignore" if settings.get("ignore") is not None else "exclude_modules"
    if _excluded(strings(settings.get(key), key), names, engine):
        return None
    bits = 4 if algorithm == ALGORITHMS[4] and _quantizes_inputs(settings) else 16
    return Scheme(formats[0], 4, GROUP, activations=bits)


def _quantizes_inputs(settings: dict[str, Any]) -> bool:
    """vLLM takes groups without input_activations for weights only."""
    groups = settings.get("config_groups")
    if not is_object(groups) or not groups:
        return True
    return any(is_object(g) and g.get("input_activations") is not None for g in groups.values())


def _excluded(entries: Sequence[str], names: Sequence[str], engine: str) -> bool:
    for name in names:
        parts = (name, *name.split(".")) if engine == SGLANG else (name,)
        if any(fnmatchcase(part, entry) for part in parts for entry in entries):
            return True
        if engine != SGLANG and any(entry and entry in name for entry in entries):
            return True
    return False


FORMAT = Format(
    NAME,
    Method((NAME, "modelopt_fp4"), _read, files=_files),
    (4,),
    _parts,
    _unpack,
    _nearest,
    _pack,
    config=_config,
    label="NVFP4A{activations}",
    command="nvfp4",
    choice=NAME,
    group_sizes=(GROUP,),
    beside=("input_scale",),
    fuses=True,
    activations=(16, 4),
    block_scales=_block_scales,
    input_scale=_input_scale,
)
