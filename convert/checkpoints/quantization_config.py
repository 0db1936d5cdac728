"""Which scheme config.json gives a matrix, matched as vLLM and SGLang match it.

compressed-tensors: `re:` patterns match from the start of the name, other targets are whole names, and a name or
pattern wins over the class name "Linear" whatever their order (vLLM compressed_tensors/utils.py). Experts are looked
up by the names that the engines know them by: `model.layers.L.mlp.experts.0.w1` (vLLM) and
`model.layers.L.block_sparse_moe.experts.0.gate_proj` (SGLang), besides the release's own.
GPTQ `dynamic`: the first rule that matches wins, "-:" leaves unquantized (vLLM gptq_utils.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors before 2025
SGLANG = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored. `group`: inputs that share a scale, -1 a whole row; `block`: (rows, columns) of FP8."""

    format: str  # float-quantized, pack-quantized, int-quantized, awq, gptq
    bits: int
    group: int = -1
    symmetric: bool = True
    block: tuple[int, int] | None = None
    act_order: bool = False
    zeros_plus_one: bool = True  # GPTQ v1 stores zero points minus one


def engine_names(name: str) -> list[str]:
    """The names under which engines look a matrix up: the release's, vLLM's, SGLang's."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return [name]
    layer, expert, projection = match.groups()
    names = [name, f"{layer}.mlp.experts.{expert}.{projection}", f"{layer}.mlp.experts.0.{projection}"]
    sglang = f"{layer}.block_sparse_moe.experts"
    return [*names, f"{sglang}.0.{SGLANG[projection]}", f"{layer}.mlp.experts"]


def matches(target: str, names: list[str]) -> bool:
    """Whether a compressed-tensors target (a name, or a pattern after `re:`) names the matrix."""
    if not target.startswith("re:"):
        return target in names
    try:
        return any(re.match(target[3:], name) for name in names)
    except re.error as error:
        raise InputError(f"config.json: target {target!r} is not a regular expression ({error})") from None


def scheme_of(quantization: dict[str, Any], name: str) -> Scheme | None:
    """The scheme of the matrix `name` (without .weight), None for one left as it is.

    Raises ValueError for methods and settings that are not read.
    """
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(quantization, name)
    if method in ("awq", "awq_marlin"):
        return _awq(quantization, name)
    if method in ("gptq", "gptq_marlin"):
        return _gptq(quantization, name)
    raise InputError(f"config.json: quant_method is {method!r}, expected compressed-tensors, awq, gptq or fp8")


def _compressed_tensors(quantization: dict[str, Any], name: str) -> Scheme | None:
    names = engine_names(name)
    if any(matches(target, names) for target in _strings(quantization.get("ignore") or [], "ignore")):
        return None
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError("config.json: config_groups is missing or empty")
    by_class = None
    for label, group in groups.items():
        if not isinstance(group, dict):
            raise InputError(f"config.json: config_groups.{label} is not an object")
        targets = _strings(group.get("targets") or [], f"config_groups.{label}.targets")
        if any(matches(target, names) for target in targets):
            return _ct_scheme(group, quantization, label)
        if "Linear" in targets and by_class is None:
            by_class = (group, label)
    return None if by_class is None else _ct_scheme(by_class[0], quantization, by_class[1])


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"config.json: {where} is {value!r}, expected a list of names")
    return value


def _ct_scheme(group: dict[str, Any], quantization: dict[str, Any], label: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InputError(f"config.json: config_groups.{label}.weights is missing")
    kind = group.get("format") or quantization.get("format")
    bits, strategy = weights.get("num_bits", 0), weights.get("strategy")
    known = {"float-quantized": (8,), "pack-quantized": (4, 8), "int-quantized": (8,)}
    if kind not in known or bits not in known[kind]:
        raise InputError(f"config.json: {kind} of {bits} bits in {label}, expected {_list(known)}")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise InputError(f"config.json: strategy {strategy!r} in {label}, expected tensor, channel, group or block")
    size = weights.get("group_size") if strategy == "group" else -1
    if not isinstance(size, int) or isinstance(size, bool) or size == 0 or size < -1:
        raise InputError(f"config.json: group_size {size!r} in {label}, expected a positive integer")
    if weights.get("actorder") in ("group", "dynamic"):
        raise InputError(
            f"config.json: actorder {weights['actorder']!r} in {label}: engines refuse it, expected static"
        )
    block = _block(weights.get("block_structure"), label) if strategy == "block" else None
    return Scheme(kind, bits, size, bool(weights.get("symmetric", True)), block)


def _block(value: object, label: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise InputError(f"config.json: block_structure {value!r} in {label}, expected two positive integers")
    return value[0], value[1]


def _list(known: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of {' or '.join(map(str, bits))}" for name, bits in known.items())


def _awq(quantization: dict[str, Any], name: str) -> Scheme | None:
    version = str(quantization.get("version", "gemm")).lower()
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    if version != "gemm" or bits != 4 or not _group(size):
        raise InputError(f"config.json: AWQ {version} of {bits} bits, group {size}, expected gemm of 4 bits")
    skipped = quantization.get("modules_to_not_convert") or []
    if any(part in found for part in _strings(skipped, "modules_to_not_convert") for found in engine_names(name)):
        return None
    return Scheme("awq", 4, size, not quantization.get("zero_point", True))


def _group(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)


def _gptq(quantization: dict[str, Any], name: str) -> Scheme | None:
    settings = {key: quantization.get(key) for key in ("bits", "group_size", "desc_act", "sym")}
    rules = quantization.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise InputError(f"config.json: dynamic is a {type(rules).__name__}, expected an object of rules")
    for pattern, override in rules.items():
        left = pattern.startswith("-:")
        try:
            found = any(re.match(pattern.removeprefix("-:").removeprefix("+:"), n) for n in engine_names(name))
        except re.error as error:
            raise InputError(f"config.json: dynamic rule {pattern!r} is not a regular expression ({error})") from None
        if found and left:
            return None
        if found:
            settings |= {k: v for k, v in (override or {}).items() if k in settings}
            break
    bits, size = settings["bits"], settings["group_size"]
    if bits not in (4, 8) or not isinstance(size, int) or not _group(size):
        raise InputError(f"config.json: GPTQ of {bits} bits, group {size}, expected 4 or 8 bits and -1 or more")
    first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    return Scheme("gptq", bits, size, settings["sym"] is not False, None, bool(settings["desc_act"]), first)
