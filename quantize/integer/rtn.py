"""Round to nearest on an integer grid. Scales are searched for the least squared error."""

from __future__ import annotations

from torch import Tensor

from ..finite import check_finite
from .grid import RATIOS, IntWeight, dequantize, round_to_codes, search_scales

__all__ = ["IntWeight", "dequantize", "rtn_int"]


def rtn_int(
    weight: Tensor,
    bits: int,
    group_size: int = 128,
    symmetric: bool = True,
    signed: bool = True,
    importance: Tensor | None = None,
    tries: int = RATIOS,
) -> IntWeight:
    """Nearest codes under the searched scales.

    weight      [..., O, I], any float dtype; computed in float32
    group_size  weights that share a scale; -1 for the whole row
    importance  [..., I], weight of a column's squared error in the search; None for plain square error
    tries       ranges that the search looks at

    Raises ValueError for NaN or infinity, and for a group size that does not divide the row.
    """
    check_finite(weight)
    scales, zeros = search_scales(weight, importance, bits, group_size, symmetric, signed, tries)
    return round_to_codes(weight, scales, zeros, bits)
