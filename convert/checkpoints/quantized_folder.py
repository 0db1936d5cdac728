"""Open a quantized folder (compressed-tensors, AWQ GEMM, GPTQ v1) as a Source of dequantized weights.

Values are exact products of stored codes and scales in float32. A matrix must be stored as config.json says: engines
trust the config, so a folder in which the two disagree is refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.fp8 import expand_tiles
from ...quantize.integer.pack import unpack_awq, unpack_gptq, unpack_gptq_zeros, unpack_rows, unpack_zeros_ct
from ..models.minimax_m2 import (
    EMBED,
    HEAD,
    Geometry,
    expert_name,
    global_shapes,
    is_mtp,
    kind_of,
    matrix_shapes,
    plain_shapes,
)
from .batches import batches, read_batch
from .census import Kind, count_kinds
from .extras import extra_kind, extra_notes
from .parts import Stored, fits, known_parts, parts_of
from .quantization_config import SGLANG, Scheme, SchemeBook, quantization_of
from .schedule import Schedule
from .storage import PLAIN, check_storage, engine_notes, scheme_for
from .store import ShardStore, TensorInfo
from .tensors import TORCH_DTYPES, check_count, collect_tensors, read_config, read_tensor

SAMPLED = 512  # tensors whose first bytes are in the fingerprint
SAMPLE = 256
ALIASES = {theirs: ours for ours, theirs in SGLANG.items()}

Fetch = Callable[[str], Tensor]  # a part by its suffix, on the device


class QuantizedFolder:
    """Opened from config.json and headers alone; every matrix is resolved and checked on opening."""

    def __init__(self, store: ShardStore) -> None:
        self.store, self.label, self.origin = store, store.label, store.origin
        self.config = read_config(store)
        self.geometry = Geometry.from_config(self.config)
        self.quantization = quantization_of(self.config) or {}
        self.book = SchemeBook(self.quantization)
        self.warnings: list[str] = []  # what engines would read otherwise
        found = collect_tensors(store)
        self.tensors = {n: t for n, t in found.items() if not is_mtp(n, self.geometry)}
        self.schedule = Schedule(store, self.tensors, self.geometry.layers)
        check_count(self.geometry, len(found), self.label)
        self._by_module: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            self._by_module.setdefault(self._release(module), {})[suffix] = info
        if any(self._release(n.rpartition(".")[0]) != n.rpartition(".")[0] for n in self.tensors):
            line = f"{self.label}: experts are named gate/up/down_proj; vLLM and SGLang skip them silently"
            self.warnings.append(line)
        layers = range(self.geometry.layers)
        shapes = {name: shape for layer in layers for name, shape in matrix_shapes(self.geometry, layer)}
        schemes = {name: self._scheme(name, shape) for name, shape in shapes.items()}
        read = {name: (self._by_module.get(name, {}), schemes[name]) for name in shapes}
        check_storage(self.label, self.book, read)
        self.matrices = {name: self._resolve(name, shape, schemes[name]) for name, shape in shapes.items()}
        self.warnings += engine_notes(self.label, self.book, read)
        self.notes = self.warnings + extra_notes(self.label, (n for n in self.tensors if self._extra(n)))

    def _extra(self, name: str) -> bool:
        """A tensor that nothing depends on; the scales of a cache that config.json names are none."""
        return extra_kind(name) is not None and not (self.quantization.get("kv_cache_scheme") and "_proj." in name)

    def _release(self, module: str) -> str:
        head, _, last = module.rpartition(".")
        return f"{head}.{ALIASES[last]}" if last in ALIASES and ".experts." in head else module

    def _scheme(self, name: str, shape: tuple[int, int]) -> Scheme | None:
        """The scheme of a matrix: of the first engine whose reading fits the tensors that are there."""
        parts = self._by_module.get(name, {})
        likely = scheme_for(self.book, name, parts)
        if likely is None or fits(likely, shape, parts):
            return likely
        others = (scheme for _, scheme in self.book.readings(name) if scheme is not None)
        return next((scheme for scheme in others if fits(scheme, shape, parts)), likely)

    def _resolve(self, name: str, shape: tuple[int, int], scheme: Scheme | None) -> Stored:
        parts = self._by_module.get(name, {})
        if scheme is None:
            if "weight" not in parts:
                found = ", ".join(sorted(parts)) or "nothing"
                raise InputError(f"{self.label}: {name} is stored as {found}, config.json leaves it unquantized")
            self._check(name, parts["weight"], shape, PLAIN)
            return Stored(name, shape, None, parts)
        for suffix, expected, dtypes in parts_of(scheme, shape):
            if suffix not in parts:
                found = ", ".join(sorted(parts)) or "nothing"
                raise InputError(
                    f"{self.label}: {name}.{suffix} is missing ({found} is there, {scheme.format} wants it)"
                )
            single = scheme.group == -1 and scheme.block is None and parts[suffix].shape in ((), (1,), (1, 1))
            if not (single and suffix == "weight_scale"):
                self._check(f"{name}.{suffix}", parts[suffix], expected, dtypes)
        return Stored(name, shape, scheme, parts)

    def _check(self, name: str, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if info.shape != shape:
            raise InputError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in dtypes:
            raise InputError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}")

    def validate(self) -> None:
        """What is not a quantized matrix: present, with its shape and a plain dtype. ValueError with the first
        fault.
        """
        wanted: dict[str, tuple[int, ...]] = dict(global_shapes(self.geometry))
        if self.config.get("tie_word_embeddings"):
            wanted.pop(HEAD)
        for layer in range(self.geometry.layers):
            wanted |= dict(plain_shapes(self.geometry, layer))
        if HEAD in self.tensors:
            wanted[HEAD] = global_shapes(self.geometry)[HEAD]
        missing = [name for name in wanted if name not in self.tensors]
        if missing:
            raise InputError(f"{self.label}: {len(missing)} tensors are missing, first {missing[0]}")
        for name, shape in wanted.items():
            self._check(name, self.tensors[name], shape, PLAIN)
        known = {info.name for stored in self.matrices.values() for info in known_parts(stored)}
        known |= wanted.keys() | {HEAD}
        if strange := [n for n in self.tensors if n not in known and extra_kind(n) is None]:
            raise InputError(f"{self.label}: {len(strange)} tensors are not part of this model, first {strange[0]}")

    def _scales(self, stored: Stored, suffix: str, fetch: Fetch) -> Tensor:
        scales = fetch(suffix).float()
        if not bool(torch.isfinite(scales).all()):
            raise InputError(f"{stored.parts[suffix].shard}: {stored.name}.{suffix} is not finite")
        return scales

    def dequantize(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """[out, in] float32 of a matrix by its release name without .weight."""
        stored = self.matrices[name]
        self.schedule.reading(name)
        return self._values(stored, lambda suffix: read_tensor(self.store, stored.parts[suffix]).to(device))

    def _batch(self, names: list[str], device: torch.device | str) -> Tensor:
        """[n, out, in] float32 of experts; together where they are stored alike."""
        group = [self.matrices[name] for name in names]
        alike = all(s.scheme == group[0].scheme for s in group)
        if not alike or (group[0].scheme is not None and group[0].scheme.act_order):
            return torch.stack([self.dequantize(name, device) for name in names])

        self.schedule.reading(names[0])

        def fetch(suffix: str) -> Tensor:
            infos = [stored.parts[suffix] for stored in group]
            return read_batch(self.store, infos, TORCH_DTYPES[infos[0].dtype], device)

        return self._values(group[0], fetch)

    def _values(self, stored: Stored, fetch: Fetch) -> Tensor:
        """[..., out, in] float32 from parts with any leading dimensions."""
        scheme = stored.scheme
        if scheme is None:
            return fetch("weight").float()
        if scheme.format in ("float-quantized", "int-quantized"):
            scales, codes = self._scales(stored, "weight_scale", fetch), fetch("weight").float()
            if scheme.block is not None:
                return codes * expand_tiles(scales, *stored.shape, scheme.block)
            return codes * (scales if scales.dim() == codes.dim() else scales.view(*scales.shape[:-1], 1, 1))
        if scheme.format == "pack-quantized":
            return self._packed(stored, scheme, fetch)
        return self._awq(stored, scheme, fetch) if scheme.format == "awq" else self._gptq(stored, scheme, fetch)

    def _packed(self, stored: Stored, scheme: Scheme, fetch: Fetch) -> Tensor:
        codes, zeros = unpack_rows(fetch("weight_packed"), scheme.bits, stored.shape[1]), None
        if not scheme.symmetric:
            zeros = unpack_zeros_ct(fetch("weight_zero_point"), scheme.bits, stored.shape[0])
        return _scaled(codes, self._scales(stored, "weight_scale", fetch), zeros, scheme.group)

    def _awq(self, stored: Stored, scheme: Scheme, fetch: Fetch) -> Tensor:
        codes = unpack_awq(fetch("qweight"))
        zeros = None if scheme.symmetric else unpack_awq(fetch("qzeros"))
        return _scaled(codes, self._scales(stored, "scales", fetch).transpose(-1, -2), zeros, scheme.group)

    def _gptq(self, stored: Stored, scheme: Scheme, fetch: Fetch) -> Tensor:
        codes = unpack_gptq(fetch("qweight"), scheme.bits)
        scales, zeros = self._scales(stored, "scales", fetch).transpose(-1, -2), None
        if not scheme.symmetric:
            zeros = unpack_gptq_zeros(fetch("qzeros"), scheme.bits)
            if not scheme.zeros_plus_one:
                half = 1 << (scheme.bits - 1)
                zeros = (zeros.int() - 1 + half) % (2 * half) - half
        if not scheme.act_order:
            return _scaled(codes, scales, zeros, scheme.group)
        index = fetch("g_idx").long()
        if not bool(((index >= 0) & (index < scales.shape[1])).all()):
            shard = stored.parts["g_idx"].shard
            raise InputError(f"{shard}: {stored.name}.g_idx names groups beyond {scales.shape[1]}")
        moved = codes.float() if zeros is None else codes.float() - zeros.float()[:, index]
        return moved * scales[:, index]

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by release name."""
        stem = name.removesuffix(".weight")
        if stem in self.matrices:
            return self.dequantize(stem)
        if name == HEAD and name not in self.tensors and self.config.get("tie_word_embeddings"):
            name = EMBED
        if name not in self.tensors:
            raise InputError(f"{self.label}: {name} is missing")
        self.schedule.reading(name)
        return read_tensor(self.store, self.tensors[name]).float()

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, dequantized on the device."""
        shape = self.matrices[expert_name(layer, 0, projection)].shape
        out = torch.empty((len(experts), *shape), device=device, dtype=dtype)
        for part in batches(len(experts)):
            names = [expert_name(layer, experts[position], projection) for position in part]
            out[part.start : part.stop] = self._batch(names, device).to(dtype)
        return out

    def small_file(self, name: str) -> bytes | None:
        return self.store.small(name)

    def close(self, finished: bool = False) -> None:
        self.store.close(finished)

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        kinds = ((("extra (skipped)" if self._extra(n) else kind_of(n)), t) for n, t in self.tensors.items())
        return count_kinds((kind, t.dtype, t.shape, t.size) for kind, t in kinds)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the model."""
        return sum(info.size for info in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Digest over the config, the tensors' names and shapes, and the first bytes of some of them."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        names = sorted(self.tensors)
        for name in names:
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for name in names[:: max(1, len(names) // SAMPLED)]:
            info = self.tensors[name]
            digest.update(self.store.read(info.shard, info.offset, min(SAMPLE, info.size)))
        return digest.hexdigest()


def _scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """(codes [..., O, I] - zeros [..., O, G]) * scales [..., O, G], groups of `group` inputs (-1: one)."""
    inputs = codes.shape[-1]
    size = inputs if group == -1 else group
    if inputs % size == 0:
        blocks = codes.unflatten(-1, (-1, size)).float()
        moved = blocks if zeros is None else blocks - zeros.float().unsqueeze(-1)
        return (moved * scales.unsqueeze(-1)).flatten(-2)
    spread = scales.repeat_interleave(size, -1)[..., :inputs]
    moved = codes.float() if zeros is None else codes.float() - zeros.float().repeat_interleave(size, -1)[..., :inputs]
    return moved * spread
