"""compressed-tensors float-quantized, FP8 E4M3 in tiles: `weight` [O, I] and a scale per 128x128 tile.

Activations are quantized per token and 128 channels when they arrive. Exact from a native FP8 release.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quantize.fp8 import quantize_tiles, round_up_bfloat16
from . import compressed_tensors as ct
from .format import Fetch, Format, Part, Scheme, Shape
from .scales import plain_codes, plain_values

NAME = "float-quantized"
TILE = (128, 128)


def parts(scheme: Scheme, shape: Shape) -> list[Part]:
    """E4M3 codes and their scales."""
    return plain_codes(scheme, shape, ("F8_E4M3",))


def unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    """Codes times scales."""
    del shape
    return plain_values(scheme, fetch)


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del names
    each = [quantize_tiles(weight, scheme.block or TILE, round_up_bfloat16) for weight in weights]
    scales = torch.stack([scale for _, scale in each]).to(torch.bfloat16)
    return {"weight": torch.stack([codes for codes, _ in each]), "weight_scale": scales}


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    tile = scheme.block or TILE
    weights = ct.arguments(8, "float", "block", block_structure=list(tile))
    return ct.group(NAME, targets, weights, ct.arguments(8, "float", "group", dynamic=True, group_size=tile[1]))


FORMAT = Format(
    NAME,
    ct.METHOD,
    (8,),
    parts,
    unpack,
    _nearest,
    group=_group,
    config=ct.one_group,
    label="FP8_BLOCK",
    manifest=ct.NAME,
    command="fp8",
    choice="block",
    strategies=("block",),
    requantizable=True,
)
