"""The envelope of compressed-tensors: config groups out, and the group of a matrix in. Its formats are other modules.

As the engines' loaders take it (compressed-tensors 0.17-0.20). Targets are regular expressions that match both engines'
prefixes (vLLM: mlp.experts, SGLang: the release's name); vLLM would ignore exact expert names. Reading: a name or
pattern wins over the class name "Linear" whatever their order (vLLM compressed_tensors/utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmquant.errors import InputError

from ..files.parse import is_object, one_line, short
from ..models.names import TensorNames
from .format import Format, Method, Scheme
from .settings import block_of, is_group
from .skip_lists import matches, strings
from .spec import TensorSpec

ATTENTION_TARGET = "re:.*self_attn.*"
EXPERTS_TARGET = r"re:.*experts\..*"
VERSION = "0.17.0"  # the oldest compressed-tensors whose reader takes these files (pinned by vLLM 0.33)
BY_INDEX = ("group", "dynamic")  # actorder: weight_g_idx names the groups of the inputs
ZERO_POINT, LARGE = "weight_zero_point", (128, 128)  # a shape that every format takes
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


def arguments(bits: int, kind: str, strategy: str, **more: object) -> dict[str, Any]:
    """How weights or activations are quantized, all keys spelled out."""
    base: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
    }
    return {**base, **more}


def group(
    storage: str, targets: list[str], weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An entry of config_groups."""
    return {
        "format": storage,
        "input_activations": activations,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def quantization_config(
    groups: Mapping[str, dict[str, Any]], storage: str, ignore: tuple[str, ...], kv_cache: bool = False
) -> dict[str, Any]:
    """The quantization_config of config.json; `storage` is the top-level format, each group names its own."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "config_groups": dict(groups),
        "format": storage,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": scheme if kv_cache else None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def entry(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The entry of config_groups for a scheme of any of its formats."""
    assert scheme.format.group is not None, scheme.format
    return scheme.format.group(targets, scheme)


def one_group(scheme: Scheme, attention: bool, names: TensorNames, kv_cache: bool = False) -> dict[str, Any]:
    """quantization_config of a folder whose experts, and attention or not, are stored by one scheme."""
    targets = ["Linear"] if attention else [EXPERTS_TARGET]
    ignore = names.ignore if attention else (*names.ignore, ATTENTION_TARGET)
    return quantization_config({scheme.label: entry(scheme, targets)}, scheme.format.name, ignore, kv_cache)


def cache_specs(keys: str, values: str) -> list[TensorSpec]:
    """Scales of an FP8 KV cache, under the names that both engines read; `keys`, `values`: names of k_proj, v_proj."""
    return [TensorSpec(keys + ".k_scale", "F32", (1,)), TensorSpec(values + ".v_scale", "F32", (1,))]


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    del engine  # all match alike, by names of their own
    if any(matches(target, names) for target in strings(quantization.get("ignore"), "ignore")):
        return None
    groups = quantization.get("config_groups")
    if not is_object(groups) or not groups:
        raise InputError("config.json: config_groups is missing or empty")
    by_class = None
    for key, said in groups.items():
        label = one_line(key)
        if not is_object(said):
            raise InputError(f"config.json: config_groups.{label} is not an object")
        targets = strings(said.get("targets"), f"config_groups.{label}.targets")
        if any(matches(target, names) for target in targets):
            return _scheme(formats, said, quantization, label)
        if "Linear" in targets and by_class is None:
            by_class = (said, label)
    return None if by_class is None else _scheme(formats, by_class[0], quantization, by_class[1])


def _scheme(formats: Sequence[Format], said: dict[str, Any], quantization: dict[str, Any], label: str) -> Scheme | None:
    weights = said.get("weights")
    if weights is None and "weights" in said:  # activations or a cache alone are quantized
        return None
    if not is_object(weights):
        raise InputError(f"config.json: config_groups.{label}.weights is missing")
    kind = said.get("format") or quantization.get("format")
    bits, strategy = weights.get("num_bits", 0), weights.get("strategy") or _strategy(weights.get("group_size"))
    rows = [row for row in formats if row.name == kind and row.reads(bits)]
    if not rows:
        raise InputError(f"config.json: {one_line(kind)} of {short(bits)} bits in {label}, expected {_list(formats)}")
    if strategy not in STRATEGIES:
        raise InputError(f"config.json: strategy {short(strategy)} in {label}, expected {', '.join(STRATEGIES)}")
    size = weights.get("group_size") if strategy in ("group", "tensor_group") else -1
    if not is_group(size):
        raise InputError(f"config.json: group_size {short(size)} in {label}, expected a positive integer")
    block = block_of(weights.get("block_structure"), f"block_structure in {label}") if strategy == "block" else None
    row = next((row for row in rows if strategy in row.strategies), None)
    if row is None:
        read = " or ".join(dict.fromkeys(s for row in rows for s in row.strategies))
        raise InputError(f"config.json: {kind} by strategy {short(strategy)} in {label}, expected {read}")
    if row.group_sizes is not None and size not in row.group_sizes:
        raise InputError(f"config.json: {kind} in groups of {size} in {label}, expected {row.group_sizes[0]}")
    given = said.get("input_activations")
    four = 4 in row.activations and is_object(given) and given.get("num_bits") == 4
    scheme = Scheme(
        row,
        bits,
        size,
        bool(weights.get("symmetric", True)),
        block,
        act_order=strategy == "group" and weights.get("actorder") in BY_INDEX,
        whole=strategy == "tensor",
        activations=4 if four else 16,
    )
    if not scheme.symmetric and not any(part.suffix == ZERO_POINT for part in row.parts(scheme, LARGE)):
        raise InputError(f"config.json: {kind} with zero points in {label}, expected symmetric")
    return scheme


def _strategy(size: object) -> str:
    """What an absent strategy stands for."""
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _list(formats: Sequence[Format]) -> str:
    known = dict.fromkeys((row.name, tuple(sorted(row.bits + row.more_bits))) for row in formats)
    return ", ".join(f"{name} of {' or '.join(map(str, bits))}" for name, bits in known)


NAME = "compressed-tensors"
METHOD = Method((NAME,), _read, single=True)
