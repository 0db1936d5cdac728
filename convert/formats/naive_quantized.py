"""compressed-tensors int-quantized and naive-quantized: a code per element and scales. Read only.

`weight` I8 [O, I], naive-quantized F8_E4M3 too, `weight_scale` per tile, group, row or matrix, asymmetric
`weight_zero_point` in the same shape. Codes of fewer than 8 bits take a byte as well.
"""

from __future__ import annotations

from torch import Tensor

from . import compressed_tensors as ct
from .format import Fetch, Format, Part, Scheme, Shape
from .scales import plain_codes, plain_values

BITS = (8, 1, 2, 3, 4, 5, 6, 7)


def _int_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    return plain_codes(scheme, shape, ("I8",))


def _any_parts(scheme: Scheme, shape: Shape) -> list[Part]:
    return plain_codes(scheme, shape, ("I8", "F8_E4M3"))


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del shape
    return plain_values(scheme, fetch)


INTEGERS = Format("int-quantized", ct.METHOD, BITS, _int_parts, _unpack, strategies=ct.STRATEGIES)
NAIVE = Format("naive-quantized", ct.METHOD, BITS, _any_parts, _unpack, strategies=ct.STRATEGIES)
