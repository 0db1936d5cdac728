"""Open a GGUF model (split or whole, by any tool) as a Source of dequantized weights."""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError, naming, naming_label

from ...quantize.ggml.codec import decode
from ..checkpoints.census import Kind, count_kinds
from ..checkpoints.schedule import Range, ReadAhead
from ..checkpoints.store import Origin
from ..files.together import interrupted
from ..models import ARCHITECTURES, architecture_of
from ..models.architecture import Architecture
from ..models.gguf import Metadata
from ..naming import cached_repository
from .header import GgufFile, GgufTensor, read_header
from .names import OUTPUT, TOKEN_EMBD, all_shapes, expert_tensor, gguf_name, release_name, split_block
from .tokenizer import tokenizer_config, tokenizer_json

INPUT_SCALE = ".input_scale"  # of activations; llama.cpp's own kernels for them aside, no weight depends on it
SAMPLE = 1024  # bytes of each tensor in the fingerprint
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def folder_of(path: Path) -> Path:
    """The folder of a GGUF model that is named by a file or by its folder."""
    return path if path.is_dir() else path.parent


def find_parts(path: Path) -> list[Path]:
    """The file itself, all parts of a split of which `path` is one, or the one model of a folder.

    Raises InputError for parts that are missing, a folder with several models, and a fix that was killed among parts.
    """
    if interrupted(folder_of(path)) is not None:
        raise InputError(
            f"{folder_of(path)}: a fix of these files was interrupted, only some are rescaled; run the same "
            f"mmquant doctor --fix again to complete it"
        )
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        models = [f for f in files if (m := _SPLIT.fullmatch(f.name)) is None or int(m[2]) == 1]
        if len(models) != 1:
            found = ", ".join(f.name for f in models[:4]) or "none"
            raise InputError(f"{path}: {len(models)} GGUF models ({found}), expected one: name the file")
        path = models[0]
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, total + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise InputError(f"{path}: {len(missing)} of {total} parts are missing, first {missing[:1] or path.name}")
    return parts


class GgufSource:
    """Opened from headers alone; `validate` holds them against the geometry."""

    def __init__(self, path: Path, files: list[GgufFile] | None = None) -> None:
        """files: the parts of a model that is still being written (convert/gguf/growing.py)."""
        found = cached_repository(path)
        self.label, self.origin = str(path), Origin(*found) if found else Origin()
        self.notes: list[str] = []
        self.files = files or [read_header(part) for part in find_parts(path)]
        self.metadata = self.files[0].metadata
        self._check_split()
        self.ahead = ReadAhead()
        self._where: dict[str, tuple[GgufFile, GgufTensor]] = {}
        for file in self.files:
            for name, tensor in file.tensors.items():
                if name in self._where:
                    raise InputError(f"{file.path}: {name} stands in {self._where[name][0].path.name} as well")
                self._where[name] = (file, tensor)
        with naming(self.label):
            self.config = self._config()
            self.geometry = architecture_of(self.config).geometry(self.config)
        # A hostile header must not make us list layers that no file could hold.
        if self.geometry.layers > len(self._where):
            raise InputError(f"{self.label}: {self.geometry.layers} layers, but only {len(self._where)} tensors")

    def _check_split(self) -> None:
        found = Metadata(self.metadata, self.label)
        count = found.number("split.count", len(self.files))
        if count not in (0, len(self.files)):
            raise InputError(f"{self.label}: split.count is {count}, the name says {len(self.files)} files")
        for number, file in enumerate(self.files):
            place = file.metadata.get("split.no", number)
            if place != number:
                raise InputError(f"{file.path}: split.no is {reprlib.repr(place)}, expected {number}")
        total = sum(len(file.tensors) for file in self.files)
        expected = found.number("split.tensors.count", total)
        if expected != total:
            raise InputError(f"{self.label}: {total} tensors in all parts, split.tensors.count is {expected}")

    def _config(self) -> dict[str, Any]:
        """config.json's keys as the metadata has them."""
        row = self._row()
        if TOKEN_EMBD not in self._where:
            raise InputError(f"{self.label}: {TOKEN_EMBD} is missing")
        return {
            "architectures": [row.class_name],
            "model_type": row.model_type,
            **row.gguf_config(Metadata(self.metadata, self.label)),
            "vocab_size": self._where[TOKEN_EMBD][1].shape[0],
            "tie_word_embeddings": OUTPUT not in self._where,
        }

    def _row(self) -> Architecture:
        """The architecture that general.architecture names. Raises InputError."""
        arch, rows = self.metadata.get("general.architecture"), ARCHITECTURES.values()
        if (row := next((row for row in rows if row.gguf.arch == arch), None)) is not None:
            return row
        known = " or ".join(repr(row.gguf.arch) for row in rows)
        raise InputError(f"{self.label}: general.architecture is {reprlib.repr(arch)}, expected {known}")

    def validate(self) -> None:
        """Every tensor of the geometry present with its shape, and no other. ValueError with the first fault."""
        expected = all_shapes(self.geometry)
        if OUTPUT not in self._where:
            expected.pop(OUTPUT)
        missing = [name for name in expected if name not in self._where]
        if missing:
            raise InputError(f"{self.label}: {len(missing)} tensors are missing, first {missing[0]}")
        for name, shape in expected.items():
            file, tensor = self._where[name]
            if tensor.shape != shape:
                raise InputError(f"{file.path}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        others = [name for name in self._where if name not in expected and not self._beyond(name)]
        scales = [name for name in others if name.endswith(INPUT_SCALE)]
        if scales:
            line = f"{self.label}: {len(scales)} static scales of activations skipped, first {scales[0]}"
            self.notes = [*self.notes, line] if line not in self.notes else self.notes
        extra = [name for name in others if name not in scales]
        if extra:
            raise InputError(f"{self.label}: {len(extra)} tensors are not part of this model, first {extra[0]}")

    def _beyond(self, name: str) -> bool:
        """A multi-token-prediction layer after the model's own: known, skipped."""
        layer, _ = split_block(name)
        return layer is not None and layer >= self.geometry.layers

    def locate(self, name: str) -> tuple[GgufFile, GgufTensor]:
        """The file that holds a tensor, and the tensor, by its GGUF name. ValueError when it is missing."""
        if name not in self._where:
            raise InputError(f"{self.label}: {name} is missing")
        return self._where[name]

    def tensor_type(self, name: str) -> str:
        """The ggml type of a tensor, by its GGUF name."""
        return self._where[name][1].kind.name

    def _rows(self, name: str) -> tuple[Tensor, GgufTensor]:
        """A tensor's bytes [rows, bytes of a row] uint8, in memory of their own, and what they are."""
        file, tensor = self._entered(name)
        return torch.from_numpy(file.raw(tensor)[:].copy()), tensor

    def _entered(self, name: str) -> tuple[GgufFile, GgufTensor]:
        """`locate`, for reading it now: the layer after the tensor's is read ahead."""
        block, _ = split_block(name)
        if block is not None:
            self.ahead.enter(block, self._ranges)
        return self.locate(name)

    def _ranges(self, block: int) -> list[Range]:
        places = [where for name, where in self._where.items() if split_block(name)[0] == block]
        return [(file.path, t.offset, t.offset + t.size) for file, t in places]

    def read(self, name: str) -> Tensor:
        """Dequantized float32 CPU tensor by release name."""
        stored, expert = gguf_name(self.geometry.names, name)
        if stored == OUTPUT and stored not in self._where:
            stored = TOKEN_EMBD
        if expert is not None:
            return self._experts(stored, range(expert, expert + 1), "cpu", torch.float32)[0]
        rows, tensor = self._rows(stored)
        return decode(rows, tensor.kind, tensor.shape[-1]).view(tensor.shape)

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] of one projection, decoded on the device."""
        return self._experts(f"blk.{layer}.{expert_tensor(projection)}.weight", experts, device, dtype)

    def _experts(self, name: str, experts: range, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        file, tensor = self._entered(name)
        count, rows, columns = tensor.shape
        if experts.stop > count:
            raise InputError(f"{self.label}: {name} has {count} experts, asked for {experts.stop - 1}")
        out = torch.empty((len(experts), rows, columns), device=device, dtype=dtype)
        data = file.raw(tensor).reshape(count, rows, -1)
        for position, expert in enumerate(experts):
            part = torch.from_numpy(data[expert].copy()).to(device)
            out[position] = decode(part, tensor.kind, columns).to(dtype)
        return out

    def file_names(self) -> Collection[str]:
        """None: the small files are made of the metadata."""
        return ()

    def ggml_type(self, name: str) -> str | None:
        """The ggml type of a tensor, None when it is missing."""
        return self.tensor_type(name) if name in self._where else None

    def close(self, finished: bool = False) -> None:
        """Nothing stays open."""

    @naming_label
    def small_file(self, name: str) -> bytes | None:
        """config.json, tokenizer.json and tokenizer_config.json (with the chat templates), made of the metadata."""
        if name == "config.json":
            return json.dumps(self.config).encode()
        if name == "tokenizer.json":
            return tokenizer_json(self.metadata, self.geometry.architecture.gguf)
        return tokenizer_config(self.metadata) if name == "tokenizer_config.json" else None

    def census(self) -> list[Kind]:
        """Count, type, bytes and weights of each kind of tensor; stacked experts count as one tensor."""
        where = ((name, tensor) for name, (_, tensor) in self._where.items())
        return count_kinds((self._kind(n), t.kind.name, t.shape, t.size) for n, t in where)

    def _kind(self, name: str) -> str:
        if self._beyond(name):
            return "mtp (skipped)"
        names = self.geometry.names
        return "extra (skipped)" if name.endswith(INPUT_SCALE) else names.kind_of(release_name(names, name, 0))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors of the model."""
        return sum(tensor.size for name, (_, tensor) in self._where.items() if not self._beyond(name))

    @property
    def fingerprint(self) -> str:
        """Hex digest that identifies the weights."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """Digest over the headers and the first bytes of every tensor."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.data[: file.header_bytes].tobytes())
            for tensor in file.tensors.values():
                digest.update(file.data[tensor.offset : tensor.offset + min(SAMPLE, tensor.size)].tobytes())
        return digest.hexdigest()
