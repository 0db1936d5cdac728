"""What formats share: scales of groups, tiles, rows; scales that must be finite, or exact in float16."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.fp8 import dequantize_tiles, expand_tiles
from .format import FLOATS, Fetch, Part, PartError, Scheme, Shape

ZEROS = ("I8", "I32", "F8_E4M3", *FLOATS)  # what zero points that are not packed may be
NO_INDEX = -1  # of compressed-tensors: the order of the inputs was left as it is


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
    size = inputs if group == -1 else min(group, inputs)  # what config.json says is not allocated
    if inputs % size == 0:
        blocks = torch.unflatten(codes, -1, (-1, size)).float()
        moved = blocks if zeros is None else blocks - zeros.float().unsqueeze(-1)
        return (moved * scales.unsqueeze(-1)).flatten(-2)
    spread = scales.repeat_interleave(size, -1)[..., :inputs]
    moved = codes.float() if zeros is None else codes.float() - zeros.float().repeat_interleave(size, -1)[..., :inputs]
    return moved * spread


def of_rows(values: Tensor, codes: Tensor, scheme: Scheme) -> Tensor:
    """Scales or zero points as [..., O or 1, G], for codes [..., O, I]; those of rows or of a matrix may lie flat."""
    return values.reshape(*codes.shape[:-2], -1, 1) if scheme.group == -1 else values


def ordered(codes: Tensor, scales: Tensor, zeros: Tensor | None, index: Tensor, suffix: str) -> Tensor:
    """The same of one matrix whose input i is in group index[i]. PartError for groups that are not there."""
    if not bool(((index >= 0) & (index < scales.shape[-1])).all()):
        raise PartError(suffix, f"names groups beyond {scales.shape[-1]}")
    index = index.long()
    moved = codes.float() if zeros is None else codes.float() - zeros.float()[:, index]
    return moved * scales[:, index]


def scales_shape(scheme: Scheme, shape: Shape) -> tuple[int, int]:
    """The shape of the scales of tiles, groups or rows."""
    if scheme.block is not None:
        return ceil(shape[0] / scheme.block[0]), ceil(shape[1] / scheme.block[1])
    return shape[0], groups_of(scheme, shape[1])


def plain_codes(scheme: Scheme, shape: Shape, dtypes: tuple[str, ...], suffix: str = "weight_scale") -> list[Part]:
    """Parts of a format that keeps one code per element: `weight` [O, I] and scales of tiles, groups or rows.

    Asymmetric: weight_zero_point in the shape of the scales. act_order: weight_g_idx.
    """
    scales, single = scales_shape(scheme, shape), scheme.block is None and scheme.group == -1
    parts = [Part("weight", shape, dtypes), Part(suffix, scales, FLOATS, single=single)]
    if not scheme.symmetric:
        parts.append(Part("weight_zero_point", scales, ZEROS, single=single))
    return [*parts, *g_idx(scheme, shape)]


def g_idx(scheme: Scheme, shape: Shape) -> list[Part]:
    """The part that says the group of each input, where there is one."""
    return [Part("weight_g_idx", (shape[1],), ("I32", "I64"))] if scheme.act_order else []


def plain_values(scheme: Scheme, fetch: Fetch, suffix: str = "weight_scale") -> Tensor:
    """Values of `plain_codes`, exact products in float32."""
    scales, codes = finite(fetch, suffix), fetch("weight")
    if codes.is_floating_point():
        codes = finite(fetch, "weight")
    zeros = None if scheme.symmetric else finite(fetch, "weight_zero_point")
    if scheme.block is not None:
        rows, columns = codes.shape[-2:]
        moved = codes if zeros is None else codes.float() - expand_tiles(zeros, rows, columns, scheme.block)
        return dequantize_tiles(moved, scales, scheme.block)
    return grouped(codes, scales, zeros, scheme, fetch)


def grouped(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, fetch: Fetch) -> Tensor:
    """Values of compressed-tensors' codes [..., O, I] by group, row or matrix, or by weight_g_idx."""
    scales = of_rows(scales, codes, scheme)
    zeros = None if zeros is None else of_rows(zeros, codes, scheme)
    if scheme.act_order and bool(((index := fetch("weight_g_idx")) != NO_INDEX).all()):
        return ordered(codes, scales, zeros, index, "weight_g_idx")
    return scaled(codes, scales, zeros, scheme.group)


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
