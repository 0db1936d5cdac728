"""Copy a released checkpoint; read every file back and compare it by SHA-256.

Two things differ from the release: an artifact with NaN or infinity is not made, and config.json loses entries of
auto_map whose code is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mmquant.errors import InputError

from ..checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, read_tensor
from ..checkpoints.finite import check_finite
from ..checkpoints.store import INDEX, TensorInfo, shard_names
from ..files.atomic import copy_whole, sha256_file, write_whole
from ..manifest import FileEntry
from ..models.shapes import matrix_shapes
from ..remote_code import with_code

UNQUANTIZED = "its weights are not FP8 (config.json has no quantization_config)"


def copy_native(
    source: Checkpoint, out: Path, carried: Mapping[str, bytes], done: Callable[[str], object]
) -> tuple[FileEntry, ...]:
    """Copy shards and small files (`carried`) into `out`; files that are there already with the same bytes are kept.

    Raises OSError when a copy reads back differently, InputError for a tensor with NaN or infinity.
    """
    entries: list[FileEntry] = []
    tensors: dict[str, list[TensorInfo]] = {}
    for info in source.tensors.values():
        tensors.setdefault(info.shard, []).append(info)
    source.store.plan(shard_names(source.store))
    for name in shard_names(source.store):
        for info in sorted(tensors.get(name, ()), key=lambda info: info.offset):
            if info.dtype in TORCH_DTYPES:
                check_finite(read_tensor(source.store, info), f"{source.label}: {name}: {info.name}")
        digest = _copy(source.store.path(name), out / name)
        entries.append(FileEntry(name, (out / name).stat().st_size, digest))
        source.store.release(name)
        done(name)
    for name, data in {**_described(source), **carried}.items():
        (out / name).parent.mkdir(exist_ok=True)
        write_whole(out / name, data)
        entries.append(FileEntry(name, len(data), hashlib.sha256(data).hexdigest()))
    return tuple(entries)


def check_native(source: Checkpoint) -> None:
    """InputError unless every expert is FP8 in tiles: only such a release may be called FP8 when it is copied."""
    if source.tile is None:
        raise InputError(f"{source.label}: {UNQUANTIZED}; expected the FP8 release, or --scheme block or channel")
    for layer in range(source.geometry.layers):
        for name, _ in matrix_shapes(source.geometry, layer):
            if ".experts." in name and not source.is_quantized(name):
                dtype = source.tensors[name + ".weight"].dtype
                raise InputError(f"{source.label}: {name} is {dtype}, expected FP8; use --scheme block or channel")


def _described(source: Checkpoint) -> dict[str, bytes]:
    """The index, and config.json: byte for byte where auto_map (if any) has its code."""
    config, kept = source.small_file("config.json"), with_code(source.config, source.small_file)
    if kept != source.config:
        config = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
    found = {"config.json": config, INDEX: source.small_file(INDEX)}
    return {name: data for name, data in found.items() if data is not None}


def _copy(path: Path, final: Path) -> str:
    if final.exists() and final.stat().st_size == path.stat().st_size:
        digest = sha256_file(path)
        if sha256_file(final) == digest:
            return digest
    return copy_whole(path, final)
