"""AWQ: scale important input channels up before rounding, and what feeds them down by as much.

A matrix W with inputs x computes (W t)(x / t) for any positive t per channel. t is searched so that rounding W t costs
the outputs least, measured by the second moments of x; who produces x (a norm, another matrix) absorbs 1/t.
Source: Lin et al., https://arxiv.org/abs/2306.00978: t = x^a / w^(1-a), searched over a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq_grid import GptqGrid
from .grid import RATIOS, IntWeight, dequantize
from .rtn import rtn_int

POINTS = 10
TRIES = 6  # ranges looked at while scales are compared; the chosen one is searched in full
LARGEST = 64.0  # of t and of 1/t: beyond it float16 activations are at risk


def output_error(weight: Tensor, values: Tensor, second: Tensor) -> Tensor:
    """[E]: mean square error of the outputs, tr((W - Q) H (W - Q)^T); weight, values [E, O, n], second [E, n, n]."""
    error = weight - values
    return ((error @ second) * error).sum((-1, -2))


def round_scaled(weight: Tensor, second: Tensor, scale: Tensor, grid: GptqGrid, tries: int = RATIOS) -> IntWeight:
    """Codes of W t with clips searched under the moments of x / t; scale [n] or [E, n]."""
    importance = second.diagonal(dim1=-2, dim2=-1) / scale.square()
    scaled = weight * scale.unsqueeze(-2)
    return rtn_int(scaled, grid.bits, grid.group_size, grid.symmetric, importance=importance, tries=tries)


def candidates(weight: Tensor, diagonal: Tensor, shared: bool, group: int) -> list[Tensor]:
    """Scales to try: the powers of the inputs' size, alone and over the weights' size; the first is one everywhere.

    weight [E, O, n], diagonal [E, n] mean squares of the inputs -> each [n] when shared, else [E, n].
    """
    inputs = diagonal.clamp(min=0).sqrt()
    grouped = torch.unflatten(weight.abs(), -1, (-1, group))
    size = (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(-2).mean(-2)
    if shared:
        inputs, size = inputs.mean(0), size.mean(0)
    floor = 1e-4 * inputs.mean(-1, keepdim=True) + 1e-30
    inputs = inputs.clamp(min=floor)
    found = [torch.ones_like(inputs)]
    for index in range(1, POINTS + 1):
        power = index / POINTS
        found += [_centred(inputs**power), _centred(inputs**power / (size ** (1 - power) + 1e-4))]
    return found


def _centred(scale: Tensor) -> Tensor:
    return (scale / scale.log().mean(-1, keepdim=True).exp()).clamp(1 / LARGEST, LARGEST)


def search_equalization(weight: Tensor, second: Tensor, grid: GptqGrid, shared: bool) -> Tensor:
    """The scale t with the least error of the outputs: [n] for all matrices together, or [E, n] for each.

    weight [E, O, n] float32, second [E, n, n] mean second moments.
    """
    group = weight.shape[-1] if grid.group_size == -1 else grid.group_size
    tried = candidates(weight, second.diagonal(dim1=-2, dim2=-1), shared, group)
    best, chosen = None, tried[0].clone()
    for scale in tried:
        values = dequantize(round_scaled(weight, second, scale, grid, TRIES)) / scale.unsqueeze(-2)
        error = output_error(weight, values, second)
        if shared:
            error = error.sum()
        if best is None:
            best = error
            continue
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better.unsqueeze(-1), scale, chosen)
    return chosen
