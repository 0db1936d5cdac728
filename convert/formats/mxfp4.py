"""compressed-tensors mxfp4-pack-quantized (OCP MXFP4, weights only): E2M1 codes under a power of two per 32 inputs.

`weight_packed` U8 [O, I/2], the even input in the low nibble, bit 3 the sign; `weight_scale` U8 [O, I/32], value
2^(s - 127), read as F8_E8M0 too. Rounding to nearest: s = 127 + floor(log2(amax)) - 2, with amax taken as the next
power of two from a mantissa of 1.75 on; codes and that rule are those of compressed-tensors 0.19.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compressed_tensors as ct
from .format import Fetch, Format, Part, PartError, Scheme, Shape

NAME, GROUP = "mxfp4-pack-quantized", 32
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NOT_A_NUMBER = 127, 255  # of E8M0


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    del scheme
    outputs, inputs = shape
    packed = Part("weight_packed", (outputs, (inputs + 1) // 2), ("U8",))
    return [packed, Part("weight_scale", (outputs, -(-inputs // GROUP)), ("U8", "F8_E8M0"))]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    words, exponents = fetch("weight_packed"), fetch("weight_scale").view(torch.uint8)
    if bool((exponents == NOT_A_NUMBER).any()):
        raise PartError("weight_scale", "is not finite")
    table = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=words.device)
    codes = torch.stack((words & 15, words >> 4), -1).flatten(-2)[..., : shape[1]]
    scales = _power(exponents.int() - BIAS).repeat_interleave(GROUP, -1)[..., : shape[1]]
    return table[codes.int()] * scales


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del names, scheme
    groups = torch.unflatten(weights.float(), -1, (-1, GROUP))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1))  # mantissa in [0.5, 1): 0.875 stands for 1.75
    power = (exponent - 1 + (mantissa >= 0.875).int() - 2).clamp(-BIAS, BIAS)
    power = torch.where(mantissa == 0, torch.full_like(power, -BIAS), power)
    ratio = groups / _power(power).unsqueeze(-1)
    levels = torch.tensor(LEVELS, device=weights.device)
    low = torch.bucketize(ratio.abs(), (levels[1:] + levels[:-1]) / 2)  # ties to the lower level
    tie = (low < 7) & (ratio.abs() == ((levels[1:] + levels[:-1]) / 2)[low.clamp(max=6)])
    codes = low + (tie & (low % 2 == 1)) + 8 * torch.signbit(ratio)  # ties to the even code
    codes = codes.flatten(-2).to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return {"weight_packed": packed, "weight_scale": (power + BIAS).to(torch.uint8)}


def _power(exponent: Tensor) -> Tensor:
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
    _nearest,
    group=_group,
    config=ct.one_group,
    label="MXFP4A16",
    manifest=ct.NAME,
    strategies=("group",),
    group_sizes=(GROUP,),
)
