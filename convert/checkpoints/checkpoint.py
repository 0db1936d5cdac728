"""Open a checkpoint that can be quantized (BF16 or FP8) from its headers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmquant.errors import InputError, naming_label
from mmquant.stages import stage

from ...quantize.fp8 import E4M3_MAX, dequantize_tiles
from ..formats.format import Scheme
from ..formats.fp8_native import SCALES
from ..formats.plain import PLAIN
from ..models import architecture_of
from ..models.shapes import expert_shape, global_shapes, is_mtp, matrix_shapes, plain_shapes
from .batches import batches, read_batch
from .census import Kind, count_kinds
from .extras import extra_kind, extra_notes
from .fingerprint import fingerprint
from .finite import check_finite, first_bad
from .quantization_config import SchemeBook, quantization_of
from .schedule import Schedule
from .storage import check_method, check_storage, engine_notes, modules_of, no_source, scheme_for
from .store import LocalFolder, ShardStore, TensorInfo
from .tensors import TORCH_DTYPES, check_count, collect_tensors, read_config, read_scale, read_tensor

if TYPE_CHECKING:
    from ..source import SharedLayer

Kept = tuple[tuple[int, ...], ...]  # of every layer the experts that stay, ascending
LARGEST_SCALE = torch.finfo(torch.float32).max / E4M3_MAX


class Checkpoint:
    """The source of everything: exact float32 values of FP8 (or BF16) weights, by release name."""

    @naming_label
    def __init__(self, store: ShardStore) -> None:
        self.store = store
        self.label, self.origin = store.label, store.origin
        self.notes: list[str] = []
        self.kept: Kept | None = None  # of a pruned one: the original's numbers of each layer's experts
        self.shared: SharedLayer | None = None  # of a run in which several artifacts are made
        self.config = read_config(store)
        self.geometry = architecture_of(self.config).geometry(self.config)
        self.names = self.geometry.names
        quantization = quantization_of(self.config)
        self.book = None if quantization is None else SchemeBook(quantization, self.names)
        check_method(self.book)
        self.tensors = collect_tensors(store)
        self.skipped = {n: t for n, t in self.tensors.items() if is_mtp(n, self.geometry) or extra_kind(n, self.names)}
        used = {n: t for n, t in self.tensors.items() if n not in self.skipped}
        self.schedule = Schedule(store, used, self.geometry)
        self._modules = modules_of(used)
        self._schemes: dict[str, Scheme | None] = {}
        self._checked: set[str] = set()  # what validate() need not do again
        self.notes = extra_notes(self.label, (n for n in self.skipped if not is_mtp(n, self.geometry)), self.names)
        if self.config.get("tie_word_embeddings") and (head := self.names.head) in self.tensors:
            self.notes.append(f"{self.label}: tie_word_embeddings is true beside {head}: the stored head is used")

    # -- what is FP8 -------------------------------------------------------------------------------------------------

    @naming_label
    def scheme(self, name: str) -> Scheme | None:
        """How the matrix of this name (without .weight) is quantized, None for plain. InputError for less than FP8."""
        if name not in self._schemes:
            found = scheme_for(self.book, name, self._modules.get(name, {}))
            if found is not None and not found.format.requantizable:
                raise no_source(self.label, found)
            self._schemes[name] = found
        return self._schemes[name]

    def is_quantized(self, name: str) -> bool:
        """Whether the matrix of this name (without .weight) is FP8."""
        return self.scheme(name) is not None

    def tile_of(self, name: str) -> tuple[int, int] | None:
        """(rows, columns) under one scale where the matrix is FP8 in tiles; None for plain and other FP8."""
        scheme = self.scheme(name)
        return None if scheme is None else scheme.block

    def has_channels(self, name: str) -> bool:
        """Whether the matrix is FP8 with a scale for every row (or one for all of them)."""
        scheme = self.scheme(name)
        return scheme is not None and scheme.block is None

    @property
    def is_native(self) -> bool:
        """Whether every FP8 matrix is stored as the release stores it: in tiles, scales named weight_scale_inv."""
        quantized = [name for name in self.matrices() if self.is_quantized(name)]
        native = (self.tile_of(n) is not None and self.scale_name(n).endswith(SCALES[0]) for n in quantized)
        return bool(quantized) and all(native)

    @cached_property
    def tile(self) -> tuple[int, int] | None:
        """The tile of all matrices in tiles; None when there are none. InputError when they differ."""
        tiles = {self.tile_of(name) for name in self.matrices()} - {None}
        if len(tiles) > 1:
            raise InputError(f"{self.label}: FP8 in tiles of {' and '.join(map(str, tiles))}, expected one size")
        return next(iter(tiles), None)

    def matrices(self) -> Iterator[str]:
        """Names (without .weight) of all quantizable matrices."""
        for layer in range(self.geometry.layers):
            yield from (name for name, _ in matrix_shapes(self.geometry, layer))

    def scale_name(self, name: str) -> str:
        """The full name of a quantized matrix's scales."""
        parts = self._modules.get(name, {})
        return f"{name}.{next((s for s in SCALES if s in parts), SCALES[0])}"

    # -- validation ----------------------------------------------------------------------------------------------

    def expected(self) -> dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]:
        """name -> (shapes, dtypes) that are right for every tensor that this config calls for."""
        needed: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]] = {}
        needed |= {name: ((shape,), PLAIN) for name, shape in global_shapes(self.geometry).items()}
        if self.config.get("tie_word_embeddings") and self.names.head not in self.tensors:
            del needed[self.names.head]
        for layer in range(self.geometry.layers):
            for name, shape in plain_shapes(self.geometry, layer):
                needed[name] = ((shape,), PLAIN)
            for name, shape in matrix_shapes(self.geometry, layer):
                scheme = self.scheme(name)
                needed[name + ".weight"] = ((shape,), PLAIN if scheme is None else ("F8_E4M3",))
                if scheme is not None:
                    needed[self.scale_name(name)] = (scale_shapes(scheme, shape), PLAIN)
        return needed

    @naming_label
    def validate(self, scales: bool | None = None) -> None:
        """Check names, shapes, dtypes and that every scale is finite and positive.

        Scales are read for it, by default those of a local folder; those of a hub are checked as they are used. Raises
        InputError with the first fault and how many there are of its sort. What was found right is not looked at again.
        """
        if "names" not in self._checked:
            self._check_tensors()
            self._checked.add("names")
        if "scales" not in self._checked and (self.store.is_local if scales is None else scales):
            for name in self.expected():
                if name.endswith(SCALES):
                    self.read_scales(name)
            self._checked.add("scales")

    def _check_tensors(self) -> None:
        """The part of validate() that the headers are enough for."""
        check_count(self.geometry, 4 * len(self.tensors) + 1000, self.label)
        found = {name: (self._modules.get(name, {}), self.scheme(name)) for name in self.matrices()}
        check_storage(self.label, self.book, found)
        needed = self.expected()
        have = {n: t for n, t in self.tensors.items() if n not in self.skipped}
        if missing := [n for n in needed if n not in have]:
            raise InputError(f"{self.label}: {len(missing)} tensors are missing, first {missing[0]}")
        if extra := [n for n in have if n not in needed]:
            raise InputError(f"{self.label}: {len(extra)} tensors are not part of this model, first {extra[0]}")
        for name, (shapes, dtypes) in needed.items():
            info = have[name]
            if info.shape not in shapes:
                raise InputError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shapes[0])}")
            if info.dtype not in dtypes:
                raise InputError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}")
        self.notes += engine_notes(self.label, self.book, found)

    # -- reading ---------------------------------------------------------------------------------------------------

    @naming_label
    def raw(self, name: str) -> Tensor:
        """A tensor as stored; InputError when there is none of that name, or when it holds NaN or infinity."""
        info = self._scheduled(name)
        with stage("read"):
            values = read_tensor(self.store, info)
        check_finite(values, f"{info.shard}: {name}")
        return values

    @naming_label
    def read_scales(self, name: str) -> Tensor:
        """Scales of an FP8 matrix in float32, checked to be positive and to keep every code finite."""
        scales = read_tensor(self.store, self._scheduled(name)).float()
        if not _usable(scales):
            bad = scales[~((scales > 0) & (scales < LARGEST_SCALE))][0].item()
            raise InputError(f"{self.tensors[name].shard}: {name} holds {bad}, expected finite and positive scales")
        return scales

    def scale_dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a quantized matrix's scales."""
        return TORCH_DTYPES[self.tensors[self.scale_name(name)].dtype]

    def native(self, name: str) -> tuple[Tensor, Tensor]:
        """(e4m3 codes [O, I], scales float32 [tiles] or [O, 1] of channels) of a matrix by its name without .weight."""
        codes, scales = self.raw(name + ".weight"), self.read_scales(self.scale_name(name))
        return codes, scales if self.tile_of(name) is not None else scales.reshape(-1, 1).expand(len(codes), 1)

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by full release name."""
        if name == self.names.head and name not in self.tensors and self.config.get("tie_word_embeddings"):
            name = self.names.embed
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and name in self.tensors and self.tensors[name].dtype == "F8_E4M3":
            codes, scales = self.native(stem)
            tile = self.tile_of(stem)
            return codes.float() * scales if tile is None else dequantize_tiles(codes, scales, tile)
        return self.raw(name).float()

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, dequantized on the device."""
        out = torch.empty((len(experts), *expert_shape(self.geometry, projection)), device=device, dtype=dtype)
        for part in batches(len(experts)):
            names = [self.names.expert(layer, experts[position], projection) for position in part]
            out[part.start : part.stop] = self.dequantized(names, device).to(dtype)
        return out

    @naming_label
    def dequantized(self, names: list[str], device: torch.device | str) -> Tensor:
        """[n, out, in] float32 of experts' matrices; together where they are stored alike."""
        self.schedule.reading(names[0])
        scheme = self.scheme(names[0])
        if any(self.scheme(name) != scheme for name in names):
            return torch.stack([self.read(name + ".weight").to(device) for name in names])
        weights = [self._info(name + ".weight") for name in names]
        codes = read_batch(self.store, weights, TORCH_DTYPES[weights[0].dtype], device)
        infos = [] if scheme is None else [self._info(self.scale_name(name)) for name in names]
        scales = read_batch(self.store, infos, TORCH_DTYPES[infos[0].dtype], device) if infos else None
        with stage("dequantize"):
            if first_bad(codes) is not None:
                for info, values in zip(weights, codes, strict=True):
                    check_finite(values, f"{info.shard}: {info.name}")
            if scheme is None or scales is None:
                return codes.float()
            if not _usable(scales := scales.float()):
                for name in names:
                    self.read_scales(self.scale_name(name))
            if scheme.block is not None:
                return dequantize_tiles(codes, scales, scheme.block)
            return codes.float() * scales.reshape(len(names), -1, 1)

    def _scheduled(self, name: str) -> TensorInfo:
        info = self._info(name)
        self.schedule.reading(name)
        return info

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise InputError(f"{self.label}: {name} is missing")
        return self.tensors[name]

    def small_file(self, name: str) -> bytes | None:
        """tokenizer.json, config.json, LICENSE ... or None."""
        return self.store.small(name)

    def file_names(self) -> Collection[str]:
        """Names of the folder's files."""
        return self.store.files()

    def scale_beside(self, name: str) -> Tensor | None:
        """A scale of a cache or of a matrix's inputs [1] float32 by its full name; None where there is none."""
        return read_scale(self.store, self.tensors.get(name))

    def ggml_type(self, name: str) -> None:
        """None: this is no GGUF."""

    def close(self, finished: bool = False) -> None:
        """Stop fetching; `finished`: nothing of it will be needed again."""
        self.store.close(finished)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are used."""
        return sum(t.size for n, t in self.tensors.items() if n not in self.skipped)

    @property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.config, self.tensors, self.geometry, self.store)

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        return count_kinds((self._kind(n), t.dtype, t.shape, t.size) for n, t in self.tensors.items())

    def _kind(self, name: str) -> str:
        if name not in self.skipped:
            return self.names.kind_of(name)
        return "mtp (skipped)" if is_mtp(name, self.geometry) else "extra (skipped)"


def _usable(scales: Tensor) -> bool:
    """Whether every scale is positive, and none takes a code to infinity."""
    return bool(((scales > 0) & (scales < LARGEST_SCALE)).all())


def scale_shapes(scheme: Scheme, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes that FP8 scales of a matrix may have: tiles, or a scale a channel or for all."""
    if scheme.block is not None:
        return ((ceil(shape[0] / scheme.block[0]), ceil(shape[1] / scheme.block[1])),)
    return ((shape[0], 1), (shape[0],), (), (1,), (1, 1))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a local checkpoint folder from its config, index and headers; nothing else is read."""
    return Checkpoint(LocalFolder(folder))
