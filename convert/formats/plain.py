"""Matrices that are not quantized: `weight` [O, I] in a floating-point dtype. Schemes call them None."""

from __future__ import annotations

import torch
from torch import Tensor

from .format import Shape
from .spec import TensorSpec

PLAIN = ("BF16", "F32", "F16")  # read; the first is written


def plain_spec(name: str, shape: Shape) -> TensorSpec:
    """The tensor that is written of a matrix `name` (without .weight)."""
    return TensorSpec(name + ".weight", PLAIN[0], shape)


def plain_tensor(name: str, values: Tensor) -> dict[str, Tensor]:
    """Its value, on the CPU."""
    return {name + ".weight": values.to(torch.bfloat16).cpu()}
