"""FP8 E4M3: exact values of 128x128 tiles, and quantization per output channel.

Source: e4m3 as in https://arxiv.org/abs/2209.05433 (largest 448); a tile's value is code * weight_scale_inv.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .finite import check_finite

E4M3_MAX = 448.0
CACHE_HEADROOM = 2.0


def expand_tiles(scales: Tensor, rows: int, cols: int, tile: tuple[int, int]) -> Tensor:
    """[..., ceil(rows/tile0), ceil(cols/tile1)] -> [..., rows, cols]; ragged edges are cropped."""
    spread = scales.repeat_interleave(min(tile[0], rows), dim=-2)[..., :rows, :]
    return spread.repeat_interleave(min(tile[1], cols), dim=-1)[..., :cols]


def dequantize_tiles(codes: Tensor, scales: Tensor, tile: tuple[int, int] = (128, 128)) -> Tensor:
    """Values of e4m3 codes [..., O, I] under scales [..., ceil(O/tile0), ceil(I/tile1)], exact products in float32."""
    rows, cols = codes.shape[-2:]
    if rows % tile[0] or cols % tile[1]:
        return codes.float() * expand_tiles(scales.float(), rows, cols, tile)
    blocks = torch.unflatten(
        torch.unflatten(codes.float(), -1, (cols // tile[1], tile[1])), -3, (rows // tile[0], tile[0])
    )
    return (blocks * scales.float()[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


def quantize_tiles(
    weight: Tensor, tile: tuple[int, int] = (128, 128), round_scale: Callable[[Tensor], Tensor] = torch.Tensor.float
) -> tuple[Tensor, Tensor]:
    """Absmax e4m3 per tile: weight [O, I] -> codes [O, I], scales [ceil(O/tile0), ceil(I/tile1)] float32.

    `round_scale` maps scales to those that will be stored; codes are taken under the stored ones.
    """
    check_finite(weight)
    rows, cols = weight.shape
    tile = min(tile[0], rows), min(tile[1], cols)
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % tile[1], 0, -rows % tile[0]))
    blocks = torch.unflatten(torch.unflatten(padded, 1, (-1, tile[1])), 0, (-1, tile[0]))
    scales = round_scale(_scale(blocks.abs().amax((1, 3))))
    codes = weight.float() / expand_tiles(scales, rows, cols, tile)
    return _codes(codes), scales


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax e4m3 per output channel: weight [..., O, I] -> codes float8_e4m3fn, scales [..., O, 1].

    The scale is rounded up to bfloat16 first and the codes are taken under the rounded scale, so that readers that keep
    bfloat16 scales lose nothing and no code passes 448.
    """
    check_finite(weight)
    peak = weight.float().abs().amax(-1, keepdim=True)
    scales = round_up_bfloat16(_scale(peak))
    return _codes(weight.float() / scales), scales


def round_up_bfloat16(values: Tensor) -> Tensor:
    """The smallest bfloat16 not below each positive float32 value, as float32."""
    near = values.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < values, above.float(), near.float())


def cache_scale(peak: Tensor) -> Tensor:
    """Scale [1] of an FP8 KV cache from the largest |value| that calibration saw; the engine stores value / scale.

    With headroom: calibration does not see the largest value that will come, and e4m3 loses nothing by it.
    """
    return _scale(peak.float().amax().view(1) * CACHE_HEADROOM)


def _scale(peak: Tensor) -> Tensor:
    # A dead block gets scale 1: readers refuse zero scales.
    return torch.where(peak > 0, peak / E4M3_MAX, torch.ones_like(peak)).clamp(min=torch.finfo(torch.float32).tiny)


def _codes(scaled: Tensor) -> Tensor:
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
