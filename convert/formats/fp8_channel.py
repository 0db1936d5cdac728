"""compressed-tensors float-quantized, FP8 E4M3 with a scale per output channel; activations are quantized per token.

Read as well: a scale per matrix or per group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...quantize.fp8 import quantize_channels
from . import compressed_tensors as ct
from .format import Format, Scheme
from .fp8_block import NAME, parts, unpack


def _nearest(names: list[str], weights: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    del names, scheme
    codes, scales = quantize_channels(weights)
    return {"weight": codes, "weight_scale": scales.to(torch.bfloat16)}


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    del scheme
    activations = ct.arguments(8, "float", "token", dynamic=True)
    return ct.group(NAME, targets, ct.arguments(8, "float", "channel"), activations)


FORMAT = Format(
    NAME,
    ct.METHOD,
    (8,),
    parts,
    unpack,
    _nearest,
    group=_group,
    config=ct.one_group,
    label="FP8_DYNAMIC",
    manifest=ct.NAME,
    command="fp8",
    choice="channel",
    requantizable=True,
)
