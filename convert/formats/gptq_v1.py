"""GPTQ (v1): codes in words along the inputs, float16 scales, zero points stored minus one.

`qweight` I32 [I*bits/32, O], `qzeros` I32 [G, O*bits/32], `scales` [G, O], `g_idx` I32 [I]. Written symmetric (zero
points 7: ignored by the kernels but read for their shape) in 4 or 8 bits, read in 2 to 8. `dynamic`: the first rule
that matches wins, "-:" leaves unquantized. Layout: vLLM 0.33 auto_gptq.py, gptq_utils.py. Scales are exact in float16
and bfloat16, or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.grid import IntWeight
from ...quantize.integer.pack import pack_gptq, pack_gptq_zeros, unpack_gptq, unpack_gptq_zeros, words_of
from ...quantize.integer.rtn import rtn_int
from ..files.parse import is_object, short
from ..models.names import TensorNames
from .format import Fetch, Format, Method, Part, Scheme, Shape
from .scales import finite, groups_of, half_scales, ordered, scaled
from .settings import is_group
from .skip_lists import matches_pattern

NAME = "gptq"
SETTINGS = ("bits", "group_size", "desc_act", "sym")


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    (outputs, inputs), groups = shape, groups_of(scheme, shape[1])
    return [
        Part("qweight", (words_of(inputs, scheme.bits), outputs), ("I32",)),
        Part("qzeros", (groups, words_of(outputs, scheme.bits)), ("I32",), needed=not scheme.symmetric),
        Part("scales", (groups, outputs), ("F16", "BF16", "F32")),
        Part("g_idx", (inputs,), ("I32",), needed=scheme.act_order),
    ]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    """With act_order of one matrix, without of any stack of them."""
    codes = unpack_gptq(fetch("qweight"), scheme.bits, shape[1])
    scales, zeros = finite(fetch, "scales").transpose(-1, -2), None
    if not scheme.symmetric:
        zeros = unpack_gptq_zeros(fetch("qzeros"), scheme.bits, shape[0], scheme.zeros_plus_one)
    if not scheme.act_order:
        return scaled(codes, scales, zeros, scheme.group)
    return ordered(codes, scales, zeros, fetch("g_idx"), "g_idx")


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.int8)
    scales = torch.stack([half_scales(name, one) for name, one in zip(names, weight.scales, strict=True)])
    groups = torch.arange(weight.codes.shape[-1], dtype=torch.int32) // weight.group_size
    return {
        "qweight": pack_gptq(weight.codes, weight.bits),
        "qzeros": pack_gptq_zeros(zeros, weight.bits),
        "scales": scales.mT.contiguous(),
        "g_idx": groups.expand(len(names), -1),
    }


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    return _pack(names, rtn_int(weights, scheme.bits, scheme.group, scheme.symmetric))


def _config(scheme: Scheme, attention: bool, names: TensorNames) -> dict[str, Any]:
    skip: dict[str, Any] = {} if attention else {r"-:.*self_attn.*": {}}
    return {
        "quant_method": NAME,
        "bits": scheme.bits,
        "group_size": scheme.group,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": NAME,
        "damp_percent": 0.03,
        "true_sequential": False,
        "dynamic": skip,
    }


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    del engine
    settings = _settings(quantization, names)
    if settings is None:
        return None
    bits, size = settings["bits"], settings["group_size"]
    if not formats[0].reads(bits) or not is_group(size):
        raise InputError(
            f"config.json: GPTQ of {short(bits)} bits, group {short(size)}, expected 2 to 8 bits and -1 or more"
        )
    first = quantization.get("checkpoint_format", NAME) != "gptq_v2"
    return Scheme(formats[0], bits, size, settings["sym"] is not False, None, bool(settings["desc_act"]), first)


def _settings(quantization: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """The settings of a matrix after the first rule of `dynamic` that matches it; None: unquantized."""
    settings = {key: quantization.get(key) for key in SETTINGS}
    rules: object = quantization.get("dynamic") or {}
    if not is_object(rules):
        raise InputError(f"config.json: dynamic is a {type(rules).__name__}, expected an object of rules")
    for pattern, override in rules.items():
        if not matches_pattern(pattern.removeprefix("-:").removeprefix("+:"), names):
            continue
        if pattern.startswith("-:"):
            return None
        changes: object = override or {}
        if not is_object(changes):
            raise InputError(f"config.json: dynamic rule {short(pattern)} is {short(override)}, expected an object")
        return settings | {k: v for k, v in changes.items() if k in settings}
    return settings


FORMAT = Format(
    NAME,
    Method((NAME, "gptq_marlin"), _read, fused=True, list_key="dynamic"),
    (4, 8),
    _parts,
    _unpack,
    _nearest,
    _pack,
    config=_config,
    command="int4",
    choice=NAME,
    whole_words=True,
    more_bits=(2, 3, 5, 6, 7),
)
