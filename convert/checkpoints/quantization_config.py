"""Find the scheme that config.json gives a matrix, as vLLM, SGLang and transformers read it.

compressed-tensors: a name or pattern wins over the class name "Linear" whatever their order (vLLM
compressed_tensors/utils.py). GPTQ `dynamic`: the first rule that matches wins, "-:" leaves unquantized (vLLM
gptq_utils.py). Engines know matrices by names of their own and match lists differently (skip_lists.py): where they
disagree, how the matrix is stored decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmquant.errors import InputError

from . import skip_lists
from .skip_lists import AWQ_RULES, ENGINES, FP8_RULES, TRANSFORMERS, matches, matches_pattern, names_of, strings

# The second: compressed-tensors before 2025.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
SGLANG = skip_lists.SGLANG_NAMES
FLOAT, PACKED, INTEGER = "float-quantized", "pack-quantized", "int-quantized"
COMPRESSED_TENSORS = "compressed-tensors"


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


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of quantization; None when it says nothing. InputError when it is no object."""
    for key in QUANTIZATION_KEYS:
        value = config.get(key)
        if value is None or value == {}:
            continue
        if not isinstance(value, dict):
            raise InputError(f"config.json: {key} is a {type(value).__name__}, expected an object")
        return value
    return None


class SchemeBook:
    """The schemes of a quantization_config by matrix, one reading for each engine."""

    def __init__(self, quantization: dict[str, Any]) -> None:
        self.quantization = quantization
        self.method = str(quantization.get("quant_method"))
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise InputError(f"config.json: quant_method is {quantization.get('quant_method')!r}, expected {known}")
        self._method = METHODS[self.method]
        self._known: dict[tuple[str, tuple[str, ...]], Scheme | None] = {}

    def readings(self, name: str) -> Iterator[tuple[str, Scheme | None]]:
        """(engine, scheme or None for left as it is) of the matrix `name` (without .weight), vLLM's first.

        Raises InputError for settings that are not read.
        """
        for engine in ENGINES:
            yield engine, self.reading(name, engine)

    def reading(self, name: str, engine: str) -> Scheme | None:
        """What one engine takes the matrix for."""
        names = names_of(name, engine, self._method.single, self._method.fused)
        if (engine, names) not in self._known:
            self._known[engine, names] = self._method.read(self.quantization, names, engine)
        return self._known[engine, names]

    @property
    def integers(self) -> bool:
        """Whether the method stores integers only."""
        return self._method.integers

    @property
    def is_source(self) -> bool:
        """Whether everything that is quantized is FP8, so that it can be quantized again."""
        groups = self.quantization.get("config_groups")
        if self.method != COMPRESSED_TENSORS or not isinstance(groups, dict):
            return not self.integers
        said = [g.get("format") or self.quantization.get("format") for g in groups.values() if isinstance(g, dict)]
        return bool(said) and all(kind == FLOAT for kind in said)

    def derives(self) -> bool:
        """Whether vLLM takes the dtypes in the files for a skip list, there being none (AWQ, GPTQ)."""
        return self._method.list_key is not None and not self.quantization.get(self._method.list_key)


def _compressed_tensors(quantization: dict[str, Any], names: tuple[str, ...], engine: str) -> Scheme | None:
    if any(matches(target, names) for target in strings(quantization.get("ignore"), "ignore")):
        return None
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError("config.json: config_groups is missing or empty")
    by_class = None
    for label, group in groups.items():
        if not isinstance(group, dict):
            raise InputError(f"config.json: config_groups.{label} is not an object")
        targets = strings(group.get("targets"), f"config_groups.{label}.targets")
        if any(matches(target, names) for target in targets):
            return _ct_scheme(group, quantization, label)
        if "Linear" in targets and by_class is None:
            by_class = (group, label)
    return None if by_class is None else _ct_scheme(by_class[0], quantization, by_class[1])


def _ct_scheme(group: dict[str, Any], quantization: dict[str, Any], label: str) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise InputError(f"config.json: config_groups.{label}.weights is missing")
    kind = group.get("format") or quantization.get("format")
    bits, strategy = weights.get("num_bits", 0), weights.get("strategy")
    known = {FLOAT: (8,), PACKED: (4, 8), INTEGER: (8,)}
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
    block = _block(weights.get("block_structure"), f"block_structure in {label}") if strategy == "block" else None
    return Scheme(kind, bits, size, bool(weights.get("symmetric", True)), block)


def _block(value: object, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
        raise InputError(f"config.json: {where} is {value!r}, expected two positive integers")
    return value[0], value[1]


def _list(known: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} of {' or '.join(map(str, bits))}" for name, bits in known.items())


def _fp8(quantization: dict[str, Any], names: tuple[str, ...], engine: str) -> Scheme | None:
    """`fp8` (the release: tiles; without weight_block_size a scale a row or one for all) and `fbgemm_fp8`."""
    keys = ("modules_to_not_convert",) if engine == TRANSFORMERS else ("ignored_layers", "modules_to_not_convert")
    skipped = next((strings(quantization[key], key) for key in keys if quantization.get(key)), [])
    if FP8_RULES[engine](skipped, names):
        return None
    tile = quantization.get("weight_block_size")
    return Scheme(FLOAT, 8, block=None if tile is None else _block(tile, "weight_block_size"))


def _awq(quantization: dict[str, Any], names: tuple[str, ...], engine: str) -> Scheme | None:
    version = str(quantization.get("version", "gemm")).lower()
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    if version != "gemm" or bits != 4 or not _group(size):
        raise InputError(f"config.json: AWQ {version} of {bits} bits, group {size}, expected gemm of 4 bits")
    if AWQ_RULES[engine](strings(quantization.get("modules_to_not_convert"), "modules_to_not_convert"), names):
        return None
    return Scheme("awq", 4, size, not quantization.get("zero_point", True))


def _group(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and (size == -1 or size > 0)


def _gptq(quantization: dict[str, Any], names: tuple[str, ...], engine: str) -> Scheme | None:
    settings = {key: quantization.get(key) for key in ("bits", "group_size", "desc_act", "sym")}
    rules = quantization.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise InputError(f"config.json: dynamic is a {type(rules).__name__}, expected an object of rules")
    for pattern, override in rules.items():
        if not matches_pattern(pattern.removeprefix("-:").removeprefix("+:"), names):
            continue
        if pattern.startswith("-:"):
            return None
        if not isinstance(override or {}, dict):
            raise InputError(f"config.json: dynamic rule {pattern!r} is {override!r}, expected an object")
        settings |= {k: v for k, v in (override or {}).items() if k in settings}
        break
    bits, size = settings["bits"], settings["group_size"]
    if bits not in (4, 8) or not isinstance(size, int) or not _group(size):
        raise InputError(f"config.json: GPTQ of {bits} bits, group {size}, expected 4 or 8 bits and -1 or more")
    first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    return Scheme("gptq", bits, size, settings["sym"] is not False, None, bool(settings["desc_act"]), first)


@dataclass(frozen=True)
class Method:
    """A quant_method: how its schemes are read, how engines look experts and q, k, v up (names_of), and the key whose
    absence makes vLLM go by the dtypes in the files; `integers`: it has no other schemes."""

    read: Callable[[dict[str, Any], tuple[str, ...], str], Scheme | None]
    single: bool = False
    fused: bool = False
    list_key: str | None = None
    integers: bool = False


_AWQ = Method(_awq, list_key="modules_to_not_convert", integers=True)
_GPTQ = Method(_gptq, fused=True, list_key="dynamic", integers=True)
METHODS: Mapping[str, Method] = {
    "fp8": Method(_fp8),
    COMPRESSED_TENSORS: Method(_compressed_tensors, single=True),
    "awq": _AWQ,
    "gptq": _GPTQ,
    "fbgemm_fp8": Method(_fp8),
    "awq_marlin": _AWQ,
    "gptq_marlin": _GPTQ,
}
