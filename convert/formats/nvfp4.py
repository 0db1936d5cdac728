"""compressed-tensors nvfp4-pack-quantized: E2M1 codes, an E4M3 scale per 16 inputs, one divisor for the matrix.

`weight_packed` U8 [O, I/2], the even input in the low nibble, bit 3 the sign; `weight_scale` F8_E4M3 [O, I/16];
`weight_global_scale` F32 [1]: a weight is code * scale / global. With FP4 activations `input_global_scale` F32 [1] too:
448 * 6 over the largest input. Engines fuse gate with up and q with k and v: those share the global scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quantize.fp4.grid import NVFP4
from ...quantize.fp4.levels import from_nibbles, to_nibbles
from ...quantize.integer.grid import IntWeight
from . import compressed_tensors as ct
from .format import BlockScales, Fetch, Format, Part, PartError, Scheme, Shape
from .scales import finite

NAME, GROUP = "nvfp4-pack-quantized", NVFP4.group_size
LARGEST = 448.0 * 6.0  # largest scale times largest code
SCALE_DTYPE = "torch.float8_e4m3fn"


def block_parts(packed: str, shape: Shape) -> list[Part]:
    """Codes, under the name `packed`, and block scales."""
    outputs, inputs = shape
    return [
        Part(packed, (outputs, (inputs + 1) // 2), ("U8",)),
        Part("weight_scale", (outputs, -(-inputs // GROUP)), ("F8_E4M3",)),
    ]


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    parts = [*block_parts("weight_packed", shape), Part("weight_global_scale", (1,), ("F32",))]
    return [*parts, Part("input_global_scale", (1,), ("F32",), needed=False)] if scheme.activations == 4 else parts


def positive(fetch: Fetch, suffix: str) -> Tensor:
    """The scale of a whole matrix [...] float32. PartError unless it is a positive number."""
    scale = finite(fetch, suffix)
    if not bool((scale > 0).all()):
        raise PartError(suffix, "is not positive")
    return scale


def block_values(packed: Tensor, scales: Tensor, factor: Tensor, shape: Shape, divides: bool = False) -> Tensor:
    """[..., O, I] float32 of codes, block scales [..., O, G] and the factor (or divisor) of each matrix."""
    factor = factor.reshape(*scales.shape[:-2], 1, 1)
    scales = scales / factor if divides else scales * factor
    codes = from_nibbles(packed, shape[1]) / 2
    return codes * scales.repeat_interleave(GROUP, -1)[..., : shape[1]]


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del scheme
    packed, scales = fetch("weight_packed"), finite(fetch, "weight_scale")
    return block_values(packed, scales, positive(fetch, "weight_global_scale"), shape, divides=True)


def blocks_of(weight: IntWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of the codes, block scales in E4M3 (exact), and the unit [E] that they are multiples of."""
    assert weight.unit is not None
    scales = (2 * weight.scales / weight.unit).to(torch.float8_e4m3fn)
    return to_nibbles(weight.codes), scales, weight.unit[:, 0, 0]


def _pack(names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    del names
    packed, scales, unit = blocks_of(weight)
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (1 / unit).unsqueeze(-1)}


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del scheme
    return _pack(names, NVFP4.round_nearest(weights, None))


def stored_scales(packed: Tensor, scales: Tensor, unit: Tensor) -> BlockScales:
    """Of codes [n, O, I/2] and scales [n, O, G]."""
    some = torch.unflatten(packed & 0x77, -1, (scales.shape[-1], -1)).amax(-1)
    return BlockScales(scales.float(), some > 0, unit.flatten())


def _block_scales(fetch: Fetch) -> BlockScales:
    return stored_scales(fetch("weight_packed"), fetch("weight_scale"), fetch("weight_global_scale"))


def _input_scale(largest: Tensor) -> dict[str, Tensor]:
    return {"input_global_scale": (LARGEST / largest).unsqueeze(-1)}


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    kind: dict[str, Any] = {"group_size": GROUP, "scale_dtype": SCALE_DTYPE}
    weights = ct.arguments(4, "float", "tensor_group", **kind)
    four = ct.arguments(4, "float", "tensor_group", dynamic="local", observer="static_minmax", **kind)
    return ct.group(NAME, targets, weights, four if scheme.activations == 4 else None)


FORMAT = Format(
    NAME,
    ct.METHOD,
    (4,),
    _parts,
    _unpack,
    _nearest,
    _pack,
    _group,
    ct.one_group,
    label="NVFP4A{activations}",
    manifest=ct.NAME,
    command="nvfp4",
    choice=ct.NAME,
    strategies=("tensor_group",),
    group_sizes=(GROUP,),
    beside=("input_global_scale",),
    fuses=True,
    activations=(16, 4),
    block_scales=_block_scales,
    input_scale=_input_scale,
)
