"""Identify the weights of a checkpoint without reading them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..models.geometry import Geometry
from .store import ShardStore, TensorInfo


def fingerprint(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], geometry: Geometry, store: ShardStore
) -> str:
    """Hex digest over the config, every tensor's name, dtype and shape, and a sample of bytes that training changes."""
    digest, names = hashlib.sha256(json.dumps(config, sort_keys=True).encode()), geometry.names
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
    last = geometry.layers - 1
    sampled = [
        names.prefix(layer) + names.plain[field] for layer in sorted({0, last // 2, last}) for field in names.sampled
    ]
    for name in (*sampled, names.final_norm):
        digest.update(store.read(tensors[name].shard, tensors[name].offset, tensors[name].size))
    return digest.hexdigest()
