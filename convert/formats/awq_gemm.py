"""AWQ (GEMM): 4-bit codes in words along the outputs, in AWQ's order, with zero points and float16 scales.

`qweight` I32 [I, O/8], `qzeros` I32 [G, O/8], `scales` [G, O]. Engines cast the scales to bfloat16 when they serve in
it: they are exact in both or refused. Layout: vLLM 0.33 auto_awq.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.grid import IntWeight
from ...quantize.integer.pack import pack_awq, unpack_awq, words_of
from ...quantize.integer.rtn import rtn_int
from ..files.parse import one_line, short
from ..models.names import TensorNames
from .format import Fetch, Format, Method, Part, Scheme, Shape
from .scales import finite, groups_of, half_scales, scaled
from .settings import is_group
from .skip_lists import AWQ_RULES, strings

NAME = "awq"
SKIPPED = "modules_to_not_convert"


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    (outputs, inputs), groups = shape, groups_of(scheme, shape[1])
    return [
        Part("qweight", (inputs, words_of(outputs, scheme.bits)), ("I32",)),
        Part("qzeros", (groups, words_of(outputs, scheme.bits)), ("I32",), needed=not scheme.symmetric),
        Part("scales", (groups, outputs), ("F16", "BF16", "F32")),
    ]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    zeros = None if scheme.symmetric else unpack_awq(fetch("qzeros"), shape[0], scheme.bits)
    codes = unpack_awq(fetch("qweight"), shape[0], scheme.bits)
    return scaled(codes, finite(fetch, "scales").transpose(-1, -2), zeros, scheme.group)


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.int8)
    scales = torch.stack([half_scales(name, one) for name, one in zip(names, weight.scales, strict=True)])
    return {"qweight": pack_awq(weight.codes), "qzeros": pack_awq(zeros), "scales": scales.mT.contiguous()}


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    return _pack(names, rtn_int(weights, scheme.bits, scheme.group, scheme.symmetric))


def _config(scheme: Scheme, attention: bool, names: TensorNames) -> dict[str, Any]:
    """The router's name is listed whole: engines match substrings of module names."""
    return {
        "quant_method": NAME,
        "bits": 4,
        "group_size": scheme.group,
        "zero_point": True,
        "version": "gemm",
        SKIPPED: ["lm_head", "embed_tokens", names.router, *([] if attention else ["self_attn"])],
    }


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    version = str(quantization.get("version", "gemm")).lower()
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    if version != "gemm" or bits != 4 or not is_group(size):
        raise InputError(
            f"config.json: AWQ {one_line(version)} of {short(bits)} bits, group {short(size)}, expected gemm of 4 bits"
        )
    if AWQ_RULES[engine](strings(quantization.get(SKIPPED), SKIPPED), names):
        return None
    return Scheme(formats[0], 4, size, not quantization.get("zero_point", True))


FORMAT = Format(
    NAME,
    Method((NAME, "awq_marlin"), _read, list_key=SKIPPED),
    (4,),
    _parts,
    _unpack,
    _nearest,
    _pack,
    config=_config,
    manifest=NAME,
    command="int4",
    choice=NAME,
    symmetric=(False, True),
    whole_words=True,
)
