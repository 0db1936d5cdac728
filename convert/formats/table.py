"""The storage formats that are read and written, one row each, and the quant_methods of config.json that hold them."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    auto_round,
    awq_gemm,
    exl3,
    fp8_block,
    fp8_channel,
    fp8_native,
    gptq_v1,
    mlx,
    modelopt,
    mxfp4,
    mxfp8,
    naive_quantized,
    nvfp4,
    pack_quantized,
)
from .format import Format, Method

FORMATS: tuple[Format, ...] = (
    fp8_block.FORMAT,
    fp8_channel.FORMAT,
    fp8_native.FORMAT,
    pack_quantized.FORMAT,
    naive_quantized.INTEGERS,
    naive_quantized.NAIVE,
    awq_gemm.FORMAT,
    gptq_v1.FORMAT,
    mxfp4.FORMAT,
    mxfp8.FORMAT,
    mxfp8.SIX,
    nvfp4.FORMAT,
    modelopt.FORMAT,
    *mlx.FORMATS,
    *auto_round.FORMATS,
    *exl3.FORMATS,
)
METHODS: Mapping[str, Method] = {name: row.method for row in FORMATS for name in row.method.names}


def formats_of(method: Method) -> tuple[Format, ...]:
    """The formats that a quant_method holds."""
    return tuple(row for row in FORMATS if row.method == method)


def choices(command: str) -> dict[str, Format]:
    """What a command writes, by the word of its --format or --scheme, the default first."""
    return {row.choice: row for row in FORMATS if row.command == command}
