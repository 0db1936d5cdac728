"""The codebooks of the I-quants, read from the gguf package's tables on first use."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SIGN_BITS = 7  # IQ2_XXS, IQ2_XS and IQ3_XXS store 7 signs of 8; the eighth makes the number of minus signs even


@lru_cache
def points(name: str) -> np.ndarray:
    """Codebook of the type `name` (IQ2_XXS, ..., IQ1_M): float32 [entries, 4 or 8], whole numbers, index = stored code.

    Source: gguf.quants, whose tables restate ggml-common.h (iq2xxs_grid, ...); they are part of the file format.
    """
    from gguf import quants

    family = {"IQ1_M": "IQ1_S"}.get(name, name)
    table = getattr(quants, family)
    table.init_grid()
    return np.ascontiguousarray(table.grid.reshape(table.grid_shape), dtype=np.float32)


@lru_cache
def points_on(name: str, device: torch.device) -> Tensor:
    """The same codebook as a float32 tensor on `device`."""
    return torch.from_numpy(points(name)).to(device)


def with_parity(signs: Tensor) -> Tensor:
    """Sign bytes (bit i = minus at position i) from 7-bit codes: bit 7 makes the number of set bits even. uint8."""
    folded = signs ^ (signs >> 4)
    folded = folded ^ (folded >> 2)
    odd = (folded ^ (folded >> 1)) & 1
    return signs | (odd << SIGN_BITS)
