"""Read and write llama.cpp's importance matrix as GGUF: sums of squared activations and rows seen.

For every weight W: `W.in_sum2` F32 [matrices, inputs] = sum of x^2, `W.counts` F32 [matrices, 1] = rows. gate and up
of the experts share their input. Keys: general.type, imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size.
Others' files are told by their content, not by their name; the older binary form is imatrix_legacy.py's.
Source: llama.cpp tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmquant.errors import InputError

from ...quantize.ggml.types import GGMLType
from ..files.atomic import write_whole
from ..files.lfs import refuse_pointer
from ..files.parse import take, take_list
from .header import GgufFile, read_header
from .imatrix_legacy import read_legacy

ALIGNMENT = 32
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
IN_SUM2, COUNTS = ".in_sum2", ".counts"
LEGACY_CHUNK = 512  # tokens of a chunk by llama-imatrix's default; the older form does not say
STRING, ARRAY, UINT32, F32 = 8, 9, 4, 0  # GGUF value and tensor types
ATTENTION_IN = ("attn_q", "attn_k", "attn_v")
EXPERT_IN = ("ffn_gate_exps", "ffn_up_exps")
# Weights that see the same input, and what converters call them when they are fused: one entry serves for all.
SAME_INPUT = ((ATTENTION_IN, ("attn_qkv",)), (EXPERT_IN, ("ffn_gate_up_exps", "ffn_up_gate_exps")))
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Importance:
    """Of one weight: sums [matrices, inputs] of x^2 and counts [matrices] of rows, float32."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def mean(self) -> NDArray[np.float32]:
        """E[x^2] [matrices, inputs]; ones for a matrix that saw nothing, as llama-quantize takes it."""
        seen = self.counts[:, None] > 0
        return np.where(seen, self.sums / np.maximum(self.counts[:, None], 1), np.float32(1)).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """Weights by GGUF name (blk.N.attn_q.weight), and the text that they were made of."""

    weights: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def layer(self, layer: int) -> dict[str, Importance]:
        """One layer's weights by short name (attn_q, ffn_down_exps, ...); of those that share their input one will do.

        llama-imatrix leaves out what saw too little, and ik_llama.cpp has one entry for gate and up.
        """
        out: dict[str, Importance] = {}
        for name, value in self.weights.items():
            match = _BLOCK.fullmatch(name)
            if match is not None and int(match.group(1)) == layer:
                out[match.group(2)] = value
        for weights, fused in SAME_INPUT:
            found = next((out[name] for name in (*weights, *fused) if name in out), None)
            if found is not None:
                out = {**dict.fromkeys(weights, found), **out}
        return out


def layer_weights(
    layer: int,
    attention_in: Importance,
    attention_out: Importance,
    router: Importance,
    experts: tuple[Importance, Importance],
) -> dict[str, Importance]:
    """The eight weights of a layer that llama-imatrix collects; experts: the input of gate and up, that of down."""
    out = {name: attention_in for name in ATTENTION_IN}
    out |= {"attn_output": attention_out, "ffn_gate_inp": router, "ffn_down_exps": experts[1]}
    out |= {name: experts[0] for name in EXPERT_IN}
    return {f"blk.{layer}.{name}.weight": value for name, value in out.items()}


def imatrix_bytes(imatrix: Imatrix) -> bytes:
    """The GGUF file's bytes, laid out as llama-imatrix does: names sorted, tensors aligned to 32.

    Raises ValueError for values that llama.cpp refuses: NaN, infinity, negative sums.
    """
    tensors: list[tuple[str, tuple[int, ...], bytes]] = []
    for name, value in sorted(imatrix.weights.items()):
        check(name, value)
        matrices, inputs = value.sums.shape
        shape = (inputs,) if matrices == 1 else (inputs, matrices)
        tensors.append((name + IN_SUM2, shape, value.sums.astype("<f4").tobytes()))
        shape = (1,) if matrices == 1 else (1, matrices)
        tensors.append((name + COUNTS, shape, value.counts.astype("<f4").tobytes()))
    keys = [
        _string("general.type") + struct.pack("<I", STRING) + _string("imatrix"),
        _string(DATASETS) + struct.pack("<IIQ", ARRAY, STRING, len(imatrix.datasets)) + _strings(imatrix.datasets),
        _string(CHUNK_COUNT) + struct.pack("<II", UINT32, imatrix.chunk_count),
        _string(CHUNK_SIZE) + struct.pack("<II", UINT32, imatrix.chunk_size),
    ]
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)) + b"".join(keys))
    offset = 0
    for name, shape, data in tensors:
        out += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, F32, offset)
        offset += len(data) + -len(data) % ALIGNMENT
    out += bytes(-len(out) % ALIGNMENT)
    for _, _, data in tensors:
        out += data + bytes(-len(data) % ALIGNMENT)
    return bytes(out)


def check(name: str, value: Importance) -> None:
    """Raise ValueError unless shapes agree and every value is finite and not negative."""
    if value.sums.ndim != 2 or value.counts.shape != value.sums.shape[:1]:
        raise InputError(f"{name}: sums {value.sums.shape} and counts {value.counts.shape}, expected [m, n] and [m]")
    for label, values in (("sums", value.sums), ("counts", value.counts)):
        if not np.isfinite(values).all() or (values < 0).any():
            raise InputError(f"{name}: {label} hold NaN, infinity or negative numbers, expected finite sums of squares")


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _strings(texts: Iterable[str]) -> bytes:
    return b"".join(_string(text) for text in texts)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the file whole. Raises ValueError for values that llama.cpp refuses, OSError when it cannot be written."""
    write_whole(path, imatrix_bytes(imatrix))


def read_imatrix(path: Path) -> Imatrix:
    """Read anybody's importance matrix, GGUF or the older binary form, whatever the file is called.

    Raises InputError when it is neither, or holds values that llama.cpp refuses.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an imatrix")
    with open(path, "rb") as file:
        first = refuse_pointer(str(path), file.read(64))
    return _read_gguf(path) if first.startswith(b"GGUF") else _of_legacy(path)


def _of_legacy(path: Path) -> Imatrix:
    """The older form as this one: rows are not known, so each matrix counts as having seen every token."""
    found = read_legacy(path)
    weights: dict[str, Importance] = {}
    for name, (calls, values) in found.entries.items():
        rows = float(calls * LEGACY_CHUNK)
        value = Importance(values[None] * np.float32(rows / calls), np.array([rows], np.float32))
        check(f"{path}: {name}", value)
        weights[name] = value
    return Imatrix(weights, (found.dataset,) if found.dataset else (), found.chunks, LEGACY_CHUNK)


def split_matrices(value: Importance, matrices: int) -> Importance:
    """An entry of the older form, which does not say how many experts it holds, as `matrices` of them.

    An expert whose values are all equal saw nothing (llama-imatrix fills it with ones, older ones left zeros).
    """
    if len(value.counts) != 1 or matrices == 1 or value.sums.size % matrices:
        return value
    sums = value.sums.reshape(matrices, -1)
    seen = sums.min(axis=1) != sums.max(axis=1)
    return Importance(np.where(seen[:, None], sums, 0), np.where(seen, value.counts, 0).astype(np.float32))


def _read_gguf(path: Path) -> Imatrix:
    file = read_header(path)
    where = str(path)
    weights: dict[str, Importance] = {}
    for name in file.tensors:
        if name.endswith(IN_SUM2):
            stem = name.removesuffix(IN_SUM2)
            sums, counts = _floats(file, name), _floats(file, stem + COUNTS).reshape(-1)
            if sums.size % counts.size:
                raise InputError(f"{path}: {name} has {sums.size} values for {counts.size} matrices")
            weights[stem] = Importance(sums.reshape(counts.size, -1), counts)
            check(f"{path}: {stem}", weights[stem])
    if not weights:
        raise InputError(f"{path}: no {IN_SUM2} tensor, expected an imatrix")
    chunks, size = (take(file.metadata, key, int, where) for key in (CHUNK_COUNT, CHUNK_SIZE))
    found = file.metadata.get(DATASETS)
    datasets = [found] if isinstance(found, str) else take_list(file.metadata, DATASETS, str, where)
    return Imatrix(weights, tuple(datasets), chunks, size)


def _floats(file: GgufFile, name: str) -> NDArray[np.float32]:
    if name not in file.tensors:
        raise InputError(f"{file.path}: {name} is missing")
    tensor = file.tensors[name]
    if tensor.kind is not GGMLType.F32:
        raise InputError(f"{file.path}: {name} is {tensor.kind.name}, expected F32")
    return file.raw(tensor).reshape(-1).view("<f4").astype(np.float32).reshape(tensor.shape)
