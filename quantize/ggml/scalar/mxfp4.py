"""The exponent of an MXFP4 block: all that is searched is a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import GGMLType
from .grid import FORMS, exponent_value, nearest_levels
from .weighted import Weighted

_FORM = FORMS[GGMLType.MXFP4]
_TRIED = (0, 1, -1)  # beside the exponent that puts the largest magnitude at 8 to 16 steps; the end level is 12
_CHUNK = 1 << 21  # blocks at a time


def search_blocks(blocks: Weighted) -> tuple[Tensor, Tensor]:
    """The best exponents uint8 [P] and codes uint8 [P, 32] of all blocks."""
    w = blocks.importance()
    parts = [_search(x, v) for x, v in zip(torch.split(blocks.x, _CHUNK), torch.split(w, _CHUNK), strict=True)]
    exponents, codes = zip(*parts, strict=True)
    return torch.cat(exponents), torch.cat(codes)


def _search(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.tensor(_FORM.levels, dtype=torch.float32, device=x.device)
    middle = ((x.abs().amax(1).view(torch.int32) >> 23) - 2).clamp(1, 252)
    best_e, best_codes, best = middle, torch.zeros_like(x, dtype=torch.uint8), torch.full_like(x[:, 0], torch.inf)
    for offset in _TRIED:
        step = exponent_value(middle + offset)[:, None]
        codes = nearest_levels(x / step, _FORM)
        error = (w * (x - step * levels[codes.int()]) ** 2).sum(1)
        better = error < best
        best_e = torch.where(better, middle + offset, best_e)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best = torch.where(better, error, best)
    return best_e.to(torch.uint8), best_codes
