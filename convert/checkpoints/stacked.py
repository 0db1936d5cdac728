"""Stacks of experts in one tensor (mlx_lm), cut into the experts' own tensors without reading them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from mmquant.errors import InputError

from ..models.geometry import Geometry
from .store import TensorInfo

LEAST = 32  # bytes of an expert's codes: a hostile header cannot call for more experts than the file could hold


def unstacked(tensors: Mapping[str, TensorInfo], geometry: Geometry) -> Iterator[tuple[str, TensorInfo]]:
    """(release name, tensor) of all tensors; an expert's keeps the name of its stack.

    InputError for a stack that does not hold as many experts as config.json says.
    """
    names = geometry.names
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        place = names.stack_of(module)
        if place is None:
            yield name, info
            continue
        for expert, part in enumerate(_cut(info, geometry.experts, LEAST if suffix == "weight" else 1)):
            yield f"{names.expert(place[0], expert, place[1])}.{suffix}", part


def _cut(info: TensorInfo, experts: int, least: int) -> Iterator[TensorInfo]:
    if not info.shape or info.shape[0] != experts:
        raise InputError(f"{info.shard}: {info.name} has shape {list(info.shape)}, expected {experts} experts first")
    size = info.size // experts
    if size < least:
        raise InputError(f"{info.shard}: {info.name} has {size} bytes for an expert, expected {least} or more")
    for expert in range(experts):
        yield dataclasses.replace(info, shape=info.shape[1:], offset=info.offset + expert * size, size=size)
