"""Open a quantized folder (compressed-tensors, AWQ, GPTQ, AutoRound, ModelOpt, MLX, EXL3) as a Source of its weights.

Values are exact products of stored codes and scales in float32. A matrix must be stored as config.json says: engines
trust the config, so a folder in which the two disagree is refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from mmquant.errors import InputError, naming_label

from ..formats.format import Fetch, PartError, Scheme
from ..formats.plain import PLAIN
from ..models import architecture_of
from ..models.shapes import global_shapes, is_mtp, matrix_shapes, plain_shapes
from .batches import batches, read_batch
from .census import Kind, count_kinds
from .extras import extra_kind, extra_notes
from .parts import Stored, as_stored, fits, known_parts, shapes_of
from .quantization_config import SchemeBook, quantization_of
from .schedule import Schedule
from .stacked import unstacked
from .storage import check_storage, engine_notes, is_plain, scheme_for
from .store import ShardStore, TensorInfo
from .tensors import TORCH_DTYPES, check_count, collect_tensors, read_config, read_scale, read_tensor

SAMPLED = 512  # tensors whose first bytes are in the fingerprint
SAMPLE = 256


class QuantizedFolder:
    """Opened from config.json and headers alone; every matrix is resolved and checked on opening."""

    @naming_label
    def __init__(self, store: ShardStore) -> None:
        self.store, self.label, self.origin = store, store.label, store.origin
        self.config = read_config(store)
        self.geometry = architecture_of(self.config).geometry(self.config)
        self.names = self.geometry.names
        self._aliases = {alias: self.names.projections[key] for key, alias in self.names.sglang.items()}
        self.quantization = quantization_of(self.config) or {}
        self.book = SchemeBook(self.quantization, self.names)
        self.warnings: list[str] = []  # what engines would read otherwise
        found = collect_tensors(store)
        self.tensors = {n: t for n, t in found.items() if not is_mtp(n, self.geometry)}
        self.schedule = Schedule(store, self.tensors, self.geometry)
        parts = dict(unstacked(self.tensors, self.geometry)) if self.book.stacked else self.tensors
        check_count(self.geometry, max(len(found), len(parts)), self.label)
        self._by_module: dict[str, dict[str, TensorInfo]] = {}
        for name, info in parts.items():
            module, _, suffix = name.rpartition(".")
            self._by_module.setdefault(self._release(module), {})[suffix] = info
        if any(self._release(n.rpartition(".")[0]) != n.rpartition(".")[0] for n in self.tensors):
            line = f"{self.label}: experts are named gate/up/down_proj; vLLM and SGLang skip them silently"
            self.warnings.append(line)
        layers = range(self.geometry.layers)
        shapes = {name: shape for layer in layers for name, shape in matrix_shapes(self.geometry, layer)}
        shapes |= {n: s for n, s in self._further_shapes().items() if self.book.outside or self._is_quantized(n)}
        schemes = {name: self._scheme(name, shape) for name, shape in shapes.items()}
        read = {name: (self._by_module.get(name, {}), schemes[name]) for name in shapes}
        check_storage(self.label, self.book, read)
        self.matrices = {name: self._resolve(name, shape, schemes[name]) for name, shape in shapes.items()}
        self.warnings += engine_notes(self.label, self.book, read)
        self._zeros = self._left_out()
        self.notes = self.warnings + extra_notes(self.label, (n for n in self.tensors if self._extra(n)), self.names)

    def _is_quantized(self, name: str) -> bool:
        """Whether a matrix is there, and not as plain values."""
        return name in self._by_module and not is_plain(self._by_module[name])

    def _further_shapes(self) -> dict[str, tuple[int, int]]:
        """Routers, embeddings and head, which some quantize too."""
        g, names = self.geometry, self.names
        found = {names.prefix(layer) + names.router: (g.experts, g.hidden) for layer in range(g.layers)}
        outside = [name for name in (names.embed, names.head) if name == names.embed or not self._is_tied()]
        return found | {name.removesuffix(".weight"): (g.vocab, g.hidden) for name in outside}

    def _left_out(self) -> dict[str, tuple[int, ...]]:
        """(full name, shape) of what the format's engine computes without, where no layer has it."""
        g, found = self.geometry, dict[str, tuple[int, ...]]()
        for field in (field for field in self.book.left_out if field in self.names.plain):
            names = [self.names.prefix(layer) + self.names.plain[field] for layer in range(g.layers)]
            if not any(name in self.tensors for name in names):
                found |= dict.fromkeys(names, g.plain_fields()[field])
                told = f"{self.book.engines[0]} computes this model without, as it is read here"
                self.warnings.append(f"{self.label}: {len(names)} tensors are left out, first {names[0]}: {told}")
        return found

    def _is_tied(self) -> bool:
        """Whether the embeddings are the head, too."""
        return bool(self.config.get("tie_word_embeddings")) and self.names.head not in self.tensors

    def _extra(self, name: str) -> bool:
        """A tensor that nothing depends on; the scales of a cache that config.json names are none."""
        return extra_kind(name, self.names) is not None and not (
            self.quantization.get("kv_cache_scheme") and "_proj." in name
        )

    def _release(self, module: str) -> str:
        head, _, last = module.rpartition(".")
        return f"{head}.{self._aliases[last]}" if last in self._aliases and ".experts." in head else module

    def _scheme(self, name: str, shape: tuple[int, int]) -> Scheme | None:
        """The scheme of a matrix: of the first engine whose reading fits the tensors that are there."""
        parts = self._by_module.get(name, {})
        likely = scheme_for(self.book, name, parts)
        if likely is None:
            return None
        likely = as_stored(likely, shape, parts)
        found = {suffix: (info.dtype, info.shape) for suffix, info in parts.items()}
        try:
            derived = self.book.derived(name, found, shape)
        except PartError as error:
            raise self._located(name, parts, error) from None
        if derived is not None:
            return derived
        if fits(likely, shape, parts):
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
        for part in scheme.format.parts(scheme, shape):
            if not part.needed:
                continue
            if part.suffix not in parts:
                found = ", ".join(sorted(parts)) or "nothing"
                expected = f"({found} is there, {scheme.format.name} wants it)"
                raise InputError(f"{self.label}: {name}.{part.suffix} is missing {expected}")
            found = parts[part.suffix]
            shape_there = found.shape if found.shape in shapes_of(part) else part.shape
            self._check(f"{name}.{part.suffix}", found, shape_there, part.dtypes)
        return Stored(name, shape, scheme, parts)

    def _check(self, name: str, info: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        if info.shape != shape:
            raise InputError(f"{info.shard}: {name} has shape {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in dtypes:
            raise InputError(f"{info.shard}: {name} has dtype {info.dtype}, expected {' or '.join(dtypes)}")

    @naming_label
    def validate(self) -> None:
        """What is not a quantized matrix: present, with its shape and a plain dtype, else ValueError."""
        expected: dict[str, tuple[int, ...]] = dict(global_shapes(self.geometry))
        if self.config.get("tie_word_embeddings"):
            expected.pop(self.names.head)
        for layer in range(self.geometry.layers):
            expected |= dict(plain_shapes(self.geometry, layer))
        if (head := self.names.head) in self.tensors:
            expected[head] = global_shapes(self.geometry)[head]
        there = self.matrices.keys() | self._zeros.keys()
        expected = {n: shape for n, shape in expected.items() if n.removesuffix(".weight") not in there}
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise InputError(f"{self.label}: {len(missing)} tensors are missing, first {missing[0]}")
        for name, shape in expected.items():
            self._check(name, self.tensors[name], shape, PLAIN)
        known = {info.name for stored in self.matrices.values() for info in known_parts(stored)}
        known |= expected.keys() | {head}
        if strange := [n for n in self.tensors if n not in known and extra_kind(n, self.names) is None]:
            raise InputError(f"{self.label}: {len(strange)} tensors are not part of this model, first {strange[0]}")

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

        return self._values(group[0], self.fetch(names, device))

    def fetch(self, names: list[str], device: torch.device | str) -> Fetch:
        """Reads the parts [n, ...] of matrices that are stored alike, by suffix."""
        group = [self.matrices[name] for name in names]
        self.schedule.reading(names[0])

        def read(suffix: str) -> Tensor:
            infos = [stored.parts[suffix] for stored in group]
            return read_batch(self.store, infos, TORCH_DTYPES[infos[0].dtype], device)

        return read

    @naming_label
    def _values(self, stored: Stored, fetch: Fetch) -> Tensor:
        """[..., out, in] float32 from parts with any leading dimensions."""
        if stored.scheme is None:
            return fetch("weight").float()
        try:
            return stored.scheme.format.unpack(stored.scheme, stored.shape, fetch)
        except PartError as error:
            raise self._located(stored.name, stored.parts, error) from None

    def _located(self, name: str, parts: Mapping[str, TensorInfo], error: PartError) -> InputError:
        return InputError(f"{parts[error.suffix].shard}: {name}.{error}")

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by release name."""
        stem = name.removesuffix(".weight")
        if stem in self.matrices:
            return self.dequantize(stem)
        if name == self.names.head and self._is_tied():
            return self.read(self.names.embed)
        if name in self._zeros:
            return torch.zeros(self._zeros[name])
        if name not in self.tensors:
            raise InputError(f"{self.label}: {name} is missing")
        self.schedule.reading(name)
        return read_tensor(self.store, self.tensors[name]).float()

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, dequantized on the device."""
        shape = self.matrices[self.names.expert(layer, 0, projection)].shape
        out = torch.empty((len(experts), *shape), device=device, dtype=dtype)
        for part in batches(len(experts)):
            names = [self.names.expert(layer, experts[position], projection) for position in part]
            out[part.start : part.stop] = self._batch(names, device).to(dtype)
        return out

    def small_file(self, name: str) -> bytes | None:
        """tokenizer.json, config.json, LICENSE ... or None."""
        return self.store.small(name)

    def file_names(self) -> Collection[str]:
        """Names of the folder's files."""
        return self.store.files()

    def scheme(self, name: str) -> Scheme | None:
        """How the matrix of this name (without .weight) is stored; None for plain values."""
        return self.matrices[name].scheme

    def scale_beside(self, name: str) -> Tensor | None:
        """A scale of a cache or of a matrix's inputs [1] float32 by its full name; None where there is none."""
        return read_scale(self.store, self.tensors.get(name))

    def ggml_type(self, name: str) -> None:
        """None: this is no GGUF."""

    def close(self, finished: bool = False) -> None:
        """Stop fetching; `finished`: nothing of it will be needed again."""
        self.store.close(finished)

    def census(self) -> list[Kind]:
        """Count, dtype, bytes and weights of each kind of tensor."""
        kinds = ((("extra (skipped)" if self._extra(n) else self.names.kind_of(n)), t) for n, t in self.tensors.items())
        return count_kinds((kind, t.dtype, t.shape, t.size) for kind, t in kinds)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the model."""
        return sum(info.size for info in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights."""
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
