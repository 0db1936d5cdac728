"""AutoRound's own formats: matrices as GPTQ, AWQ, FP8, MXFP or NVFP4 have them, settings in its own words. Read only.

quant_method auto-round (once intel/auto-round). `packing_format` says how integers lie: auto_round:auto_gptq with zero
points minus one, auto_round and auto_round:gptqmodel with zero points as they are, auto_round:auto_awq; `data_type`
says what is no integer. `extra_config` overrides the settings of a module by its name, else by a pattern found in it;
16 bits leave it alone. `block_name_to_quantize` is what names of quantized modules begin with; others need an entry.
Source: AutoRound 0.16.1, export_to_autoround/ and inference/convert_model.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mmquant.errors import InputError

from ..files.parse import is_list, is_object, short
from . import awq_gemm, fp8_native, gptq_v1, mxfp4, mxfp8, nvfp4
from .format import Format, Method, Scheme
from .patterns import compiled
from .settings import block_of, is_group
from .skip_lists import AUTO_ROUND

NAMES = ("auto-round", "intel/auto-round")
DEFAULTS: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
DEFAULT_PACKING = "auto_round:auto_gptq"
PLAIN_BITS = 16  # from here on: not quantized
WHOLE = 0  # group_size: one scale for the matrix
NAME = re.compile(r"(model\.|lm_head)[\w.]*")  # of extra_config what is no pattern


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    del engine  # there is one
    settings = _settings(quantization, names)
    bits = settings["bits"]
    if type(bits) is int and bits >= PLAIN_BITS:
        return None
    kind = _kind(settings, quantization.get("packing_format"))
    row = next((row for row in formats if row.kind == kind), None)
    if row is None or not row.reads(bits):
        raise InputError(
            f"config.json: AutoRound's {short(settings['data_type'])} of {short(bits)} bits, expected {LIST}"
        )
    size, symmetric = settings["group_size"], settings["sym"] is not False
    if kind == FP8:
        return _eight(row, size)
    if not is_group(size) or (row.group_sizes is not None and size not in row.group_sizes):
        expected = "a positive integer or -1" if row.group_sizes is None else str(row.group_sizes[0])
        raise InputError(f"config.json: group_size {short(size)} of {names[0]}, expected {expected}")
    plus_one = kind != GPTQ or "gptq" in _packing(quantization.get("packing_format")).replace("gptqmodel", "")
    return Scheme(row, bits, size, symmetric, zeros_plus_one=plus_one)


def _eight(row: Format, size: object) -> Scheme:
    """FP8: a list of two stands for tiles, 0 for one scale a matrix, -1 for one a row."""
    if is_list(size):
        return Scheme(row, 8, block=block_of(size, "group_size"))
    if size not in (WHOLE, -1):
        raise InputError(f"config.json: FP8 in groups of {short(size)}, expected 0, -1 or [128, 128]")
    return Scheme(row, 8, whole=size == WHOLE)


def _packing(value: object) -> str:
    if value is None:
        return DEFAULT_PACKING
    if not isinstance(value, str):
        raise InputError(f"config.json: packing_format is {short(value)}, expected a text such as {DEFAULT_PACKING}")
    return value


def _kind(settings: dict[str, Any], packing: object) -> str:
    """Which of the formats below stores a matrix; "" for none of them."""
    data_type, said = str(settings["data_type"]), _packing(packing)
    if data_type.startswith("int"):
        return AWQ if "awq" in said else GPTQ
    if "e5m3" in said:
        return ""
    if data_type.startswith("mx_fp"):
        return f"{MXFP}{settings['bits']}"
    if data_type.startswith("nv_fp"):
        return NVFP4
    return FP8 if data_type.startswith("fp") and settings["bits"] == 8 else ""


def _settings(quantization: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What is said of the module that `names` stand for."""
    base = {key: quantization.get(key, default) for key, default in DEFAULTS.items()}
    extra: object = quantization.get("extra_config") or {}
    if not is_object(extra):
        raise InputError(f"config.json: extra_config is a {type(extra).__name__}, expected an object")
    key = next((name for name in names if name in extra), None)
    if key is None and not _in_blocks(quantization, names):
        return base | {"bits": PLAIN_BITS}
    if key is None:
        key = next((key for key in _patterns(_Same(extra)) if _found(key, names)), None)
    changes: object = {} if key is None else extra[key]
    if not is_object(changes):
        raise InputError(f"config.json: extra_config.{short(key)} is {short(changes)}, expected an object")
    return base | {key: changes[key] for key in base if changes.get(key) is not None}


class _Same:
    """An object as a key, equal to itself alone."""

    def __init__(self, extra: dict[str, Any]) -> None:
        self.extra = extra

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.extra is self.extra

    def __hash__(self) -> int:
        return id(self.extra)


@lru_cache(maxsize=1)  # every module of a model asks for the same extra_config
def _patterns(same: _Same) -> list[str]:
    """Those keys that are no names and say something; AutoScheme lists every module of a model by its name."""
    return [key for key, said in same.extra.items() if said and not NAME.fullmatch(key)]


def _found(pattern: str, names: tuple[str, ...]) -> bool:
    """Whether a pattern lies in one of the names. AutoRound passes over one that is no regular expression."""
    try:
        return any(compiled(pattern).search(name) for name in names)
    except re.error:
        return False


def _in_blocks(quantization: dict[str, Any], names: tuple[str, ...]) -> bool:
    value = quantization.get("block_name_to_quantize") or quantization.get("to_quant_block_names")
    if value is None:
        return any(".layers." in name for name in names)
    blocks = value.split(",") if isinstance(value, str) else list(_texts(value, 0))
    return any(name.startswith(block.strip()) for name in names for block in blocks)


def _texts(value: object, depth: int) -> list[str]:
    """The texts of a list, and of lists in it."""
    if isinstance(value, str):
        return [value]
    if not is_list(value) or depth > 2:
        raise InputError(f"config.json: block_name_to_quantize is {short(value)}, expected names of blocks")
    return [text for inner in value for text in _texts(inner, depth + 1)]


METHOD = Method(NAMES, _read, engines=(AUTO_ROUND,))
GPTQ, AWQ, FP8, MXFP, NVFP4 = "gptq", "awq", "fp", "mx_fp", "nv_fp"


def _row(base: Format, kind: str, label: str, **more: Any) -> Format:  # noqa: ANN401 - fields of Format
    """A format of another method, as AutoRound writes it: read only."""
    nothing: dict[str, Any] = {"nearest": None, "pack": None, "group": None, "config": None, "command": ""}
    nothing |= {"choice": "", "manifest": "safetensors", "requantizable": False, "block_scales": None}
    name = f"AutoRound {label}"
    return dataclasses.replace(base, name=name, method=METHOD, kind=kind, label=label, **nothing, **more)


FORMATS = (
    _row(gptq_v1.FORMAT, GPTQ, "GPTQ", beside=("g_idx",)),
    _row(awq_gemm.FORMAT, AWQ, "AWQ", more_bits=(5, 6, 7)),
    _row(fp8_native.FORMAT, FP8, "FP8", beside=("input_scale",)),
    _row(mxfp4.FORMAT, f"{MXFP}4", "MXFP4"),
    _row(mxfp8.FORMAT, f"{MXFP}8", "MXFP8"),
    _row(nvfp4.FORMAT, NVFP4, "NVFP4"),
)
LIST = "int of 2 to 8 bits (AWQ: 4 to 7), fp of 8, mx_fp of 4 or 8, or nv_fp of 4"
