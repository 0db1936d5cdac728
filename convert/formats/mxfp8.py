"""compressed-tensors mxfp8-quantized and mxfp6-pack-quantized: codes under a power of two per 32 inputs. Read only.

MXFP8: `weight` F8_E4M3 [O, I]. MXFP6: `weight_packed` U8 [O, 3*I/4], E2M3 codes (sign, two bits of exponent, three of
mantissa), four of them in three bytes, the first in the lowest bits. `weight_scale` U8 [O, I/32] as of MXFP4.
Source: compressed-tensors 0.20 mxfp8/base.py, mxfp6/helpers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compressed_tensors as ct
from .format import Fetch, Format, Part, Scheme, Shape
from .mxfp4 import GROUP, powers, scale_part
from .scales import finite


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    del scheme
    return [Part("weight", shape, ("F8_E4M3",)), scale_part(shape)]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    return finite(fetch, "weight") * powers(fetch, shape[1])


def _six_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    del scheme
    return [Part("weight_packed", (shape[0], -(-shape[1] // 4) * 3), ("U8",)), scale_part(shape)]


def _six_values(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    low, middle, high = torch.unflatten(fetch("weight_packed"), -1, (-1, 3)).int().unbind(-1)
    word = low | middle << 8 | high << 16
    codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], -1).flatten(-2)
    exponent, mantissa = codes >> 3 & 3, codes & 7
    eighths = torch.where(exponent == 0, mantissa, (8 + mantissa) << (exponent - 1).clamp(min=0))
    values = torch.where(codes > 31, -eighths, eighths).float() / 8
    return values[..., : shape[1]] * powers(fetch, shape[1])


FORMAT = Format(
    "mxfp8-quantized", ct.METHOD, (8,), _parts, _unpack, strategies=("group",), group_sizes=(GROUP,), manifest=ct.NAME
)
SIX = Format(
    "mxfp6-pack-quantized",
    ct.METHOD,
    (6,),
    _six_parts,
    _six_values,
    strategies=("group",),
    group_sizes=(GROUP,),
    manifest=ct.NAME,
)
