"""What formats share: scales of groups, tiles, rows; scales that must be finite, or exact in float16."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.fp8 import dequantize_tiles
from .format import FLOATS, Fetch, Part, PartError, Scheme, Shape


def groups_of(scheme: Scheme, inputs: int) -> int:
    """Scales of a row of `inputs` weights; the last group may be short."""
    return 1 if scheme.group == -1 else ceil(inputs / scheme.group)


def finite(fetch: Fetch, suffix: str) -> Tensor:
    """Scales in float32. PartError unless all are finite."""
    scales = fetch(suffix).float()
    if not bool(torch.isfinite(scales).all()):
        raise PartError(suffix, "is not finite")
    return scales


def scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """(codes [..., O, I] - zeros [..., O, G]) * scales [..., O, G], groups of `group` inputs (-1: one)."""
    inputs = codes.shape[-1]
    size = inputs if group == -1 else group
    if inputs % size == 0:
        blocks = torch.unflatten(codes, -1, (-1, size)).float()
        moved = blocks if zeros is None else blocks - zeros.float().unsqueeze(-1)
        return (moved * scales.unsqueeze(-1)).flatten(-2)
    spread = scales.repeat_interleave(size, -1)[..., :inputs]
    moved = codes.float() if zeros is None else codes.float() - zeros.float().repeat_interleave(size, -1)[..., :inputs]
    return moved * spread


def plain_codes(scheme: Scheme, shape: Shape, dtype: str, suffix: str = "weight_scale") -> list[Part]:
    """Parts of a format that keeps one code per element: `weight` [O, I] and scales of tiles, groups or rows."""
    if scheme.block is not None:
        scales, single = (ceil(shape[0] / scheme.block[0]), ceil(shape[1] / scheme.block[1])), False
    else:
        scales, single = (shape[0], groups_of(scheme, shape[1])), scheme.group == -1
    return [Part("weight", shape, (dtype,)), Part(suffix, scales, FLOATS, single=single)]


def plain_values(scheme: Scheme, fetch: Fetch, suffix: str = "weight_scale") -> Tensor:
    """Values of `plain_codes`, exact products in float32."""
    scales, codes = finite(fetch, suffix), fetch("weight")
    if scheme.block is not None:
        return dequantize_tiles(codes, scales, scheme.block)
    if scales.dim() != codes.dim():  # one for the whole matrix
        return codes.float() * scales.view(*scales.shape[:-1], 1, 1)
    return codes.float() * scales if scheme.group == -1 else scaled(codes, scales, None, scheme.group)


def half_scales(name: str, scales: Tensor) -> Tensor:
    """Scales as float16. InputError when one that matters is too large, or so small that it loses more than 2^-9.

    A group a thousand times smaller than the others of its matrix does not matter.
    """
    half = scales.to(torch.float16)
    size = scales.abs()
    off = (half.float() - scales).abs() > torch.maximum(size, size.median() / 1024) * 2.0**-9
    if bool(off.any()) or not bool(torch.isfinite(half).all()):
        worst = float(scales[off | ~torch.isfinite(half)].abs().min())
        raise InputError(f"{name}: scale {worst:.3g} does not fit float16; use format compressed-tensors")
    return half
