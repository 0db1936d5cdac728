"""A MiniMax-M2 checkpoint as released: native FP8 tiles or plain BF16, opened from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.fp8 import E4M3_MAX, dequantize_tiles
from ..files.parse import parse_json
from ..models.minimax_m2 import (
    FINAL_NORM,
    HEAD,
    Geometry,
    expert_name,
    global_shapes,
    is_mtp,
    kind_of,
    layer_of,
    layer_prefix,
    matrix_shapes,
    plain_shapes,
)
from .batches import batches, read_batch
from .finite import check_finite, first_bad
from .schedule import Schedule
from .store import LocalFolder, ShardStore, TensorInfo, shard_names

PLAIN = ("BF16", "F32", "F16")
LARGEST_SCALE = torch.finfo(torch.float32).max / E4M3_MAX
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SAMPLED = ("input_layernorm.weight", "self_attn.q_norm.weight", "block_sparse_moe.e_score_correction_bias")


@dataclass(frozen=True)
class Kind:
    """One row of the census: tensors of one kind and dtype."""

    kind: str
    dtype: str
    count: int
    bytes: int
    weights: int


def read_tensor(store: ShardStore, info: TensorInfo) -> Tensor:
    """A tensor as stored, in memory of its own (nothing stays mapped)."""
    buffer = np.empty(info.size, dtype=np.uint8)
    with open(store.path(info.shard), "rb") as file:
        file.seek(info.offset)
        got = file.readinto(buffer.data) if info.size else 0
    if got != info.size:
        raise InputError(f"{info.shard}: {info.name} has {got} of {info.size} bytes, the shard is truncated")
    return torch.from_numpy(buffer).view(TORCH_DTYPES[info.dtype]).view(info.shape)


def read_config(store: ShardStore) -> dict[str, Any]:
    """config.json of a store; ValueError when it is missing or broken."""
    data = store.small("config.json")
    if data is None:
        raise InputError(f"{store.label}: config.json is missing")
    return parse_json(data, f"{store.label}/config.json")


def collect_tensors(store: ShardStore) -> dict[str, TensorInfo]:
    """Every tensor of every shard; ValueError for one that stands twice."""
    tensors: dict[str, TensorInfo] = {}
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


class Checkpoint:
    """The source of everything: exact float32 values of native FP8 (or BF16) weights, by release name."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.label, self.origin = store.label, store.origin
        self.notes: list[str] = []
        self.config = read_config(store)
        self.geometry = Geometry.from_config(self.config)
        self.tile, self.plain_parts = _quantization(self.config)
        self.tensors = collect_tensors(store)
        self.skipped = {n: t for n, t in self.tensors.items() if is_mtp(n, self.geometry)}
        used = {n: t for n, t in self.tensors.items() if n not in self.skipped}
        self.schedule = Schedule(store, used, self.geometry.layers)

    # -- validation ----------------------------------------------------------------------------------------------

    def expected(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """name -> (shape, dtypes) of every tensor that this config calls for."""
        wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        wanted |= {name: (shape, PLAIN) for name, shape in global_shapes(self.geometry).items()}
        if self.config.get("tie_word_embeddings"):
            del wanted[HEAD]
        for layer in range(self.geometry.layers):
            for name, shape in plain_shapes(self.geometry, layer):
                wanted[name] = (shape, PLAIN)
            for name, shape in matrix_shapes(self.geometry, layer):
                if not self.is_quantized(name):
                    wanted[name + ".weight"] = (shape, PLAIN)
                    continue
                assert self.tile is not None
                tiles = (ceil(shape[0] / self.tile[0]), ceil(shape[1] / self.tile[1]))
                wanted[name + ".weight"] = (shape, ("F8_E4M3",))
                wanted[name + ".weight_scale_inv"] = (tiles, ("F32", "BF16"))
        return wanted

    def is_quantized(self, name: str) -> bool:
        """Whether the matrix of this name (without .weight) is FP8 according to config.json."""
        return self.tile is not None and not self.plain_parts & set(name.split("."))

    def validate(self, scales: bool | None = None) -> None:
        """Check names, shapes, dtypes and (by reading them; default: of a local folder) that every scale is finite and
        positive. Those of a hub are checked as they are used.

        Raises ValueError with the first fault and how many there are of its sort.
        """
        check_count(self.geometry, 4 * len(self.tensors) + 1000, self.label)
        wanted = self.expected()
        have = {n: t for n, t in self.tensors.items() if n not in self.skipped}
        if missing := [n for n in wanted if n not in have]:
            raise InputError(f"{self.label}: {len(missing)} tensors are missing, first {missing[0]}")
        if extra := [n for n in have if n not in wanted]:
            raise InputError(f"{self.label}: {len(extra)} tensors are not part of this model, first {extra[0]}")
        for name, (shape, dtypes) in wanted.items():
            info = have[name]
            if info.shape != shape:
                raise InputError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shape)}")
            if info.dtype not in dtypes:
                raise InputError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}")
        if self.store.is_local if scales is None else scales:
            for name in wanted:
                if name.endswith("weight_scale_inv"):
                    self.read_scales(name)

    # -- reading ---------------------------------------------------------------------------------------------------

    def raw(self, name: str) -> Tensor:
        """A tensor as stored; InputError when there is none of that name, or when it holds NaN or infinity."""
        info = self._scheduled(name)
        values = read_tensor(self.store, info)
        check_finite(values, f"{info.shard}: {name}")
        return values

    def read_scales(self, name: str) -> Tensor:
        """A weight_scale_inv in float32, checked to be positive and to keep every code finite."""
        scales = read_tensor(self.store, self._scheduled(name)).float()
        if not _usable(scales):
            bad = scales[~((scales > 0) & (scales < LARGEST_SCALE))][0].item()
            raise InputError(f"{self.tensors[name].shard}: {name} holds {bad}, expected finite and positive scales")
        return scales

    def scale_dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a quantized matrix's scales."""
        return TORCH_DTYPES[self.tensors[name + ".weight_scale_inv"].dtype]

    def native(self, name: str) -> tuple[Tensor, Tensor]:
        """(e4m3 codes [O, I], scales [tiles]) of a quantized matrix by its name without .weight."""
        return self.raw(name + ".weight"), self.read_scales(name + ".weight_scale_inv")

    def read(self, name: str) -> Tensor:
        if name == HEAD and name not in self.tensors and self.config.get("tie_word_embeddings"):
            name = "model.embed_tokens.weight"
        stem = name.removesuffix(".weight")
        if name in self.tensors and self.tensors[name].dtype == "F8_E4M3":
            assert self.tile is not None
            return dequantize_tiles(*self.native(stem), self.tile)
        return self.raw(name).float()

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        g = self.geometry
        shape = (g.hidden, g.expert_width) if projection == "w2" else (g.expert_width, g.hidden)
        out = torch.empty((len(experts), *shape), device=device, dtype=dtype)
        for part in batches(len(experts)):
            names = [expert_name(layer, experts[position], projection) for position in part]
            out[part.start : part.stop] = self._dequantized(names, device).to(dtype)
        return out

    def _dequantized(self, names: list[str], device: torch.device | str) -> Tensor:
        """[n, out, in] float32 of matrices that are all quantized, or all plain."""
        self.schedule.reading(names[0])
        weights = [self._info(name + ".weight") for name in names]
        codes = read_batch(self.store, weights, TORCH_DTYPES[weights[0].dtype], device)
        if first_bad(codes) is not None:
            for info, values in zip(weights, codes, strict=True):
                check_finite(values, f"{info.shard}: {info.name}")
        if not self.is_quantized(names[0]):
            return codes.float()
        suffix = ".weight_scale_inv"
        infos = [self._info(name + suffix) for name in names]
        scales = read_batch(self.store, infos, TORCH_DTYPES[infos[0].dtype], device).float()
        if not _usable(scales):
            for name in names:
                self.read_scales(name + suffix)
        assert self.tile is not None
        return dequantize_tiles(codes, scales, self.tile)

    def _scheduled(self, name: str) -> TensorInfo:
        info = self._info(name)
        self.schedule.reading(name)
        return info

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.label}: {name} is missing")
        return self.tensors[name]

    def small_file(self, name: str) -> bytes | None:
        return self.store.small(name)

    def close(self, finished: bool = False) -> None:
        self.store.close(finished)

    def layer_shards(self, layer: int | None) -> list[str]:
        """Shards that hold a layer's tensors (None: those outside the layers)."""
        names = {t.shard for n, t in self.tensors.items() if n not in self.skipped and layer_of(n) == layer}
        return sorted(names)

    @property
    def bytes(self) -> int:
        return sum(t.size for n, t in self.tensors.items() if n not in self.skipped)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Digest over the config, every tensor's name, dtype and shape, and a sample of bytes that training changes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        last = self.geometry.layers - 1
        for layer in sorted({0, last // 2, last}):
            for name in SAMPLED:
                digest.update(self._bytes(layer_prefix(layer) + name))
        digest.update(self._bytes(FINAL_NORM))
        return digest.hexdigest()

    def _bytes(self, name: str) -> bytes:
        info = self.tensors[name]
        return self.store.read(info.shard, info.offset, info.size)

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        groups: dict[tuple[str, str], Counter[str]] = {}
        for name, info in self.tensors.items():
            kind = "mtp (skipped)" if name in self.skipped else kind_of(name)
            row = groups.setdefault((kind, info.dtype), Counter())
            row.update(count=1, bytes=info.size, weights=int(np.prod(info.shape, dtype=np.int64)))
        return [Kind(k, d, c["count"], c["bytes"], c["weights"]) for (k, d), c in sorted(groups.items())]


def _usable(scales: Tensor) -> bool:
    """Whether every scale is positive, and none takes a code to infinity."""
    return bool(((scales > 0) & (scales < LARGEST_SCALE)).all())


def _quantization(config: dict[str, Any]) -> tuple[tuple[int, int] | None, set[str]]:
    """((tile rows, tile columns) or None for a plain checkpoint, name parts that stay unquantized)."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None, set()
    method, tile = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8":
        raise InputError(f"config.json: quant_method is {method!r}, expected fp8 or no quantization_config")
    if not isinstance(tile, list) or len(tile) != 2 or not all(isinstance(t, int) and t > 0 for t in tile):
        raise InputError(f"config.json: weight_block_size is {tile!r}, expected two positive integers")
    skipped = quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or []
    return (tile[0], tile[1]), set(skipped)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a local checkpoint folder from its config, index and headers; nothing else is read."""
    return Checkpoint(LocalFolder(folder))
