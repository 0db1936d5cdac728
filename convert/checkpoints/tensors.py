"""Read one tensor, one config, or the list of all tensors from a store."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError, naming

from ..files.parse import parse_json
from ..models.geometry import Geometry
from .store import ShardStore, TensorInfo, shard_names

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
}


def read_tensor(store: ShardStore, info: TensorInfo) -> Tensor:
    """A tensor as stored, in memory of its own (nothing stays mapped)."""
    buffer = np.empty(info.size, dtype=np.uint8)
    with open(store.path(info.shard), "rb") as file:
        file.seek(info.offset)
        got = file.readinto(buffer.data) if info.size else 0
    if got != info.size:
        raise truncated(store, info, got)
    return torch.from_numpy(buffer).view(TORCH_DTYPES[info.dtype]).view(info.shape)


def truncated(store: ShardStore, info: TensorInfo, got: int) -> InputError:
    """A shard that ended behind `got` bytes of a tensor."""
    found = f"{info.name} has {got} of {info.size} bytes, the shard is truncated"
    return InputError(f"{store.label}: {info.shard}: {found}")


def read_scale(store: ShardStore, info: TensorInfo | None) -> Tensor | None:
    """A scale [1] float32 that stands alone; None where there is none. InputError unless it is one positive number."""
    if info is None:
        return None
    scale = read_tensor(store, info).float().flatten()
    if len(scale) != 1 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        where = f"{store.label}: {info.shard}: {info.name}"
        raise InputError(f"{where} holds {scale[:2].tolist()}, expected one positive number")
    return scale


def read_config(store: ShardStore) -> dict[str, Any]:
    """config.json of a store; InputError when it is missing or broken."""
    data = store.small("config.json")
    if data is None:
        raise InputError(f"{store.label}: config.json is missing")
    return parse_json(data, f"{store.label}/config.json")


def collect_tensors(store: ShardStore) -> dict[str, TensorInfo]:
    """Every tensor of every shard; ValueError for one that stands twice."""
    tensors: dict[str, TensorInfo] = {}
    with naming(store.label):
        for shard in shard_names(store):
            for info in store.header(shard):
                if info.name in tensors:
                    raise InputError(f"{shard}: {info.name} stands in {tensors[info.name].shard} as well")
                tensors[info.name] = info
    return tensors


def check_count(geometry: Geometry, tensors: int, label: str) -> None:
    """Refuse sizes that no shard could hold before anything is listed by them (a hostile config.json)."""
    matrices = geometry.layers * (4 + 3 * geometry.experts)
    if matrices > tensors:
        raise InputError(f"{label}: config.json calls for {matrices} matrices, the shards hold {tensors} tensors")
