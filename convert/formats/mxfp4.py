"""compressed-tensors mxfp4-pack-quantized (OCP MXFP4, weights only): E2M1 codes under a power of two per 32 inputs.

`weight_packed` U8 [O, I/2], the even input in the low nibble, bit 3 the sign; `weight_scale` U8 [O, I/32], value
2^(s - 127), read as F8_E8M0 too. Rounding to nearest: s = 127 + floor(log2(amax)) - 2, with amax taken as the next
power of two from a mantissa of 1.75 on; codes and that rule are those of compressed-tensors 0.19.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quantize.fp4.levels import from_nibbles, nearest, to_nibbles
from ...quantize.integer.grid import IntWeight
from . import compressed_tensors as ct
from .format import Fetch, Format, Part, PartError, Scheme, Shape

NAME, GROUP = "mxfp4-pack-quantized", 32
BIAS, NOT_A_NUMBER = 127, 255  # of E8M0


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    del scheme
    outputs, inputs = shape
    return [Part("weight_packed", (outputs, (inputs + 1) // 2), ("U8",)), scale_part(shape)]


def scale_part(shape: Shape) -> Part:
    """Scales of 32 inputs each."""
    return Part("weight_scale", (shape[0], -(-shape[1] // GROUP)), ("U8", "F8_E8M0"))


def powers(fetch: Fetch, inputs: int) -> Tensor:
    """The scale of each input [..., O, I]. PartError for the code that stands for no number."""
    exponents = fetch("weight_scale").view(torch.uint8)
    if bool((exponents == NOT_A_NUMBER).any()):
        raise PartError("weight_scale", "is not finite")
    return power(exponents.int() - BIAS).repeat_interleave(GROUP, -1)[..., :inputs]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    return from_nibbles(fetch("weight_packed"), shape[1]) / 2 * powers(fetch, shape[1])


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    return {"weight_packed": to_nibbles(weight.codes), "weight_scale": exponents_of(weight)}


def exponents_of(weight: IntWeight) -> Tensor:
    """The stored scales U8."""
    _, exponent = torch.frexp(weight.scales)  # half scales: 2^(exponent - 1)
    return (exponent + BIAS).clamp(0, NOT_A_NUMBER - 1).to(torch.uint8)


def rounded(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Weights [E, O, I] rounded to nearest by the module's rule -> tensors [E, ...] by suffix."""
    del names, scheme
    groups = torch.unflatten(weights.float(), -1, (-1, GROUP))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1))  # mantissa in [0.5, 1): 0.875 stands for 1.75
    scale = (exponent - 1 + (mantissa >= 0.875).int() - 2).clamp(-BIAS, BIAS)
    scale = torch.where(mantissa == 0, torch.full_like(scale, -BIAS), scale)
    codes = nearest(2 * groups / power(scale).unsqueeze(-1))
    packed = to_nibbles(codes.flatten(-2))
    return {"weight_packed": packed, "weight_scale": (scale + BIAS).to(torch.uint8)}


def power(exponent: Tensor) -> Tensor:
    """2^exponent in float32, exact from 2^-127 (a subnormal) to 2^127."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    del scheme
    return ct.group(NAME, targets, ct.arguments(4, "float", "group", group_size=GROUP, scale_dtype="torch.uint8"))


FORMAT = Format(
    NAME,
    ct.METHOD,
    (4,),
    _parts,
    _unpack,
    rounded,
    _pack,
    _group,
    ct.one_group,
    label="MXFP4A16",
    manifest=ct.NAME,
    command="mxfp4",
    choice=ct.NAME,
    strategies=("group",),
    group_sizes=(GROUP,),
)
