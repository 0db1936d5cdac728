"""A matrix in its scheme: bfloat16, FP8 or on a grid."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..formats.format import Format, Scheme, specs
from ..formats.plain import plain_spec, plain_tensor
from ..formats.spec import TensorSpec
from .fp8 import fp8_specs, fp8_tensors


def on_grid(scheme: Scheme | None) -> TypeGuard[Scheme]:
    """Whether codes of a few bits are searched; bfloat16 and FP8 are carried, or rounded to nearest."""
    return scheme is not None and not scheme.format.requantizable


def scheme_specs(source: Checkpoint, name: str, shape: tuple[int, int], scheme: Scheme | None) -> list[TensorSpec]:
    """The tensors of a matrix `name` [O, I] in a scheme, None: bfloat16."""
    if scheme is None:
        return [plain_spec(name, shape)]
    return specs(scheme, name, shape) if on_grid(scheme) else fp8_specs(source, name, shape, scheme)


def carried_tensors(
    source: Checkpoint, name: str, device: torch.device | str, scheme: Scheme | None
) -> dict[str, Tensor]:
    """A matrix in bfloat16 (None) or FP8."""
    if scheme is None:
        return plain_tensor(name, source.read(name + ".weight"))
    return fp8_tensors(source, name, device, scheme)


def stacks(row: Format, stacked: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Projections that are solved together: what engines stack where they share scales, else each alone."""
    return stacked if row.fuses else tuple((projection,) for stack in stacked for projection in stack)
