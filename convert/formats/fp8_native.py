"""The release's own FP8: `weight` E4M3 [O, I] and `weight_scale_inv` per 128x128 tile, quant_method fp8.

Written as a verified copy only. Read as well: a scale per row or matrix, named weight_scale (fbgemm_fp8 and others).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .format import Fetch, Format, Method, Part, Scheme, Shape
from .scales import plain_codes, plain_values
from .settings import block_of
from .skip_lists import FP8_RULES, TRANSFORMERS, strings

SCALES = ("weight_scale_inv", "weight_scale")  # the release's name first


def _suffix(scheme: Scheme) -> str:
    return SCALES[0] if scheme.block is not None else SCALES[1]


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    return plain_codes(scheme, shape, ("F8_E4M3",), _suffix(scheme))


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del shape
    return plain_values(scheme, fetch, _suffix(scheme))


def _read(
    formats: Sequence[Format], quantization: dict[str, Any], names: tuple[str, ...], engine: str
) -> Scheme | None:
    keys = ("modules_to_not_convert",) if engine == TRANSFORMERS else ("ignored_layers", "modules_to_not_convert")
    skipped = next((strings(quantization[key], key) for key in keys if quantization.get(key)), list[str]())
    if FP8_RULES[engine](skipped, names):
        return None
    tile = quantization.get("weight_block_size")
    return Scheme(formats[0], 8, block=None if tile is None else block_of(tile, "weight_block_size"))


FORMAT = Format(
    "fp8",
    Method(("fp8", "fbgemm_fp8"), _read),
    (8,),
    _parts,
    _unpack,
    manifest="fp8-block",
    command="fp8",
    choice="native",
    requantizable=True,
)
