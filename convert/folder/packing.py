"""Quantized matrices as the tensors of a folder, under their full names and on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.grid import IntWeight, map_parts
from ..checkpoints.batches import to_host
from ..formats.format import Format, Scheme
from ..models.names import TensorNames

PACKED_AT_ONCE = 16  # matrices: 1 GB of temporaries at M2.7's size


def matrix_tensors(row: Format, name: str, weight: IntWeight) -> dict[str, Tensor]:
    """The tensors of one matrix [O, I] of integer codes, as `formats.specs` lists them."""
    return batch_tensors(row, [name], map_parts(weight, lambda part: part.unsqueeze(0)))


def batch_tensors(row: Format, names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    """The same of E matrices [E, O, I]; packed where they lie, copied together."""
    if row.pack is None:
        raise InputError(f"format {row.name}: expected a format of integers")
    found: dict[str, Tensor] = {}
    for start in range(0, len(names), PACKED_AT_ONCE):
        some = names[start : start + PACKED_AT_ONCE]
        part = map_parts(weight, lambda values, start=start: values[start : start + PACKED_AT_ONCE])
        found |= _named(some, row.pack(some, part))
    return found


def nearest_tensors(scheme: Scheme, names: list[str], weights: Tensor) -> dict[str, Tensor]:
    """Weights [E, O, I] rounded to nearest, as the tensors that `formats.specs` lists for each of them."""
    return stacked_tensors(scheme, [names], [weights])


def stacked_tensors(scheme: Scheme, names: list[list[str]], weights: list[Tensor]) -> dict[str, Tensor]:
    """The same of matrices that an engine stacks along the outputs (gate on up): they share scales of whole matrices.

    names [S][E], weights S of [E, O_s, I].
    """
    if scheme.format.nearest is None:
        raise InputError(f"format {scheme.format.name}: is read only")
    if len(names) == 1:
        return _named(names[0], scheme.format.nearest(names[0], weights[0], scheme))
    found: dict[str, Tensor] = {}
    rows, first = sum(w.shape[1] for w in weights), 0
    packed = scheme.format.nearest(names[0], torch.cat(weights, 1), scheme)
    for some, part in zip(names, weights, strict=True):
        outputs = slice(first, first + part.shape[1])
        found |= _named(some, {n: v[:, outputs] if v.shape[1:2] == (rows,) else v for n, v in packed.items()})
        first = outputs.stop
    return found


def as_values(scheme: Scheme, name: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Tensor:
    """[O, I] float32 that the tensors of a matrix stand for."""
    return scheme.format.unpack(scheme, shape, lambda suffix: tensors[f"{name}.{suffix}"])


def folder_config(scheme: Scheme, attention: bool, names: TensorNames) -> dict[str, Any]:
    """quantization_config of a folder whose experts (and attention) are stored by one scheme."""
    assert scheme.format.config is not None, scheme.format
    return scheme.format.config(scheme, attention, names)


def _named(names: list[str], packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors [E, ...] by suffix -> each matrix's own."""
    found: dict[str, Tensor] = {}
    for suffix, values in packed.items():
        found |= {f"{name}.{suffix}": value for name, value in zip(names, to_host(values), strict=True)}
    return found
