"""compressed-tensors int-quantized: `weight` I8 [O, I] and scales. Read only."""

from __future__ import annotations

from torch import Tensor

from . import compressed_tensors as ct
from .format import Fetch, Format, Part, Scheme, Shape
from .scales import plain_codes, plain_values


def _parts(scheme: Scheme, shape: Shape) -> list[Part]:
    return plain_codes(scheme, shape, "I8")


def _unpack(scheme: Scheme, shape: Shape, fetch: Fetch) -> Tensor:
    del shape
    return plain_values(scheme, fetch)


FORMAT = Format("int-quantized", ct.METHOD, (8,), _parts, _unpack, strategies=ct.STRATEGIES)
