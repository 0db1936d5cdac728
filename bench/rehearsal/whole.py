"""All layers end to end on a small disk: output shards are compared with what they must hold, and then discarded.

The product runs unchanged in a process of its own, but for three things: it is told that the disk is large enough, it
waits when KEPT output shards have not been discarded yet, and on a continued run it takes the recorded digest of those
that were. Discarded shards keep their size and header; their data become a hole.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .generator import fill, key_of
from .measure import MODEL, DiskWatch
from .model import Model, Piece
from .serve import started

KEPT = 8  # whole output shards of SHARD bytes on disk: those of two layers, which may still be read, and what waits
SHARD = "2GB"
BLOCK = 8 << 20
PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
SCALES = (".weight_scale", ".weight_scale_inv")  # of compressed-tensors, of the release
NOTES = "rehearsal.json"  # beside the output: what was compared and discarded


def notes_of(out: Path) -> dict[str, Any]:
    """By output shard: tensors, bytes and whether it is discarded."""
    path = out.with_name(NOTES)
    return json.loads(path.read_text()) if path.is_file() else {}


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a shard's data begin, and its tensors."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


class Comparison:
    """Output shards of an FP8 folder against the generator: every name, dtype, shape and byte."""

    def __init__(self, model: Model, seed: int, out: Path) -> None:
        self.seed, self.out, self.layers = seed, out, model.layers
        self.pieces: dict[str, Piece] = {piece.name: piece for piece in model.tensors()}
        self.notes = notes_of(out)

    def step(self) -> bool:
        """Compare the shards that became whole, discard those that nobody reads any more; whether there were any."""
        whole = sorted(self.out.glob("model-*.safetensors"))
        new = [path for path in whole if path.name not in self.notes]
        for path in new:
            self.notes[path.name] = self.compare(path)
            self._save()
        progress = self.out / ".mmquant-progress.json"
        done = json.loads(progress.read_text())["done"] if progress.is_file() else 0
        old = [p for p in whole if not self.notes[p.name]["discarded"] and self.notes[p.name]["step"] < done - 1]
        for path in old:
            self.notes[path.name]["discarded"] = True
            self._save()
            discard(path)
        return bool(new or old)

    def compare(self, path: Path) -> dict[str, Any]:
        """Raises SystemExit for the first tensor that differs."""
        start, entries = header_of(path)
        steps = [0]
        with open(path, "rb") as file:
            for name, entry in entries.items():
                self._compare(file.fileno(), start, name, entry)
                steps.append(self.step_of(name))
        return {"tensors": len(entries), "bytes": path.stat().st_size, "step": max(steps), "discarded": False}

    def _compare(self, file: int, start: int, name: str, entry: dict[str, Any]) -> None:
        piece = self.pieces[name[: -len(SCALES[0])] + SCALES[1] if name.endswith(SCALES[0]) else name]
        first, last = entry["data_offsets"]
        found = (entry["dtype"], tuple(entry["shape"]), last - first)
        if found != (piece.law.dtype, piece.shape, piece.bytes):
            raise SystemExit(f"{name}: {found}, expected {(piece.law.dtype, piece.shape, piece.bytes)}")
        key = key_of(self.seed, piece.name)
        for at in range(0, piece.bytes, BLOCK):
            data = np.frombuffer(os.pread(file, min(BLOCK, piece.bytes - at), start + first + at), np.uint8)
            expected = np.empty(min(BLOCK, piece.bytes - at), np.uint8)
            fill(expected, piece.law, key, at)
            if not np.array_equal(data, expected):
                raise SystemExit(f"{name}: bytes differ from the generator's behind {at}")

    def step_of(self, name: str) -> int:
        """The step that writes a tensor."""
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) + 1
        return 0 if "embed" in name else self.layers + 1

    def _save(self) -> None:
        path = self.out.with_name(NOTES)
        path.with_suffix(".new").write_text(json.dumps(self.notes))
        os.replace(path.with_suffix(".new"), path)

    def summary(self) -> dict[str, Any]:
        """Counts of the whole folder, and what index and config say of it."""
        index = json.loads((self.out / "model.safetensors.index.json").read_text())
        config = json.loads((self.out / "config.json").read_text())
        table = {n: path.name for path in self.out.glob("model-*.safetensors") for n in header_of(path)[1]}
        expected = {n.replace(SCALES[1], SCALES[0]) for n in self.pieces}
        return {
            "shards": len(self.notes),
            "tensors": sum(note["tensors"] for note in self.notes.values()),
            "tensor_bytes": sum(piece.bytes for piece in self.pieces.values()),
            "file_bytes": sum(note["bytes"] for note in self.notes.values()),
            "index_is_right": index["weight_map"] == table and set(table) == expected,
            "index_total": index["metadata"]["total_size"],
            "config_layers": config["num_hidden_layers"],
            "config_method": config["quantization_config"]["quant_method"],
            "manifest": (self.out / "mmquant.fit.json").is_file(),
        }


def discard(path: Path) -> None:
    """Give the disk back a shard's data; header and size stay."""
    start, _ = header_of(path)
    start = -(-start // 4096) * 4096
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb+") as file:
        size = ctypes.c_longlong(path.stat().st_size - start)
        if libc.fallocate(file.fileno(), PUNCH, ctypes.c_longlong(start), size):
            raise OSError(ctypes.get_errno(), f"{path}: cannot be discarded")


def product(options: argparse.Namespace) -> None:
    """Run `mmquant` in this process with what the discarded output needs."""
    from mmquant.commands.cli import main
    from mmquant.convert.files import growing, progress
    from mmquant.runs import folder

    out = options.folder / "out"
    check, replace = progress.Progress._check_digest, growing.replace_whole

    def check_digest(self: progress.Progress, name: str) -> None:
        if not notes_of(out).get(name, {}).get("discarded"):
            check(self, name)

    def replace_whole(temporary: Path, final: Path) -> None:
        replace(temporary, final)
        while sum(not notes_of(out).get(p.name, {}).get("discarded") for p in out.glob("model-*.safetensors")) > KEPT:
            time.sleep(0.2)

    progress.Progress._check_digest = check_digest  # type: ignore[method-assign]
    growing.replace_whole = replace_whole
    folder.check_disk = lambda *_: None
    sys.argv = ["mmquant", *(word for word in options.command if word != "--")]
    main()


def whole(options: argparse.Namespace) -> None:
    """FP8 block of all layers; the same command continues. One line of JSON, also when it is stopped in between."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out"
    server, environment = started(options.layers, options.digests, options.seed)
    words = ["fp8", "--model", MODEL, "--out", str(out), "--max-shard-size", SHARD, "--max-shards", "3"]
    layers = ["--layers", str(options.layers)]
    command = [sys.executable, "-m", "bench.rehearsal", "product", *layers, str(folder), "--", *words]
    comparison = Comparison(Model(options.layers), options.seed, out)
    began, before = time.perf_counter(), sum(note["discarded"] for note in comparison.notes.values())
    with DiskWatch(folder) as disk:
        child = subprocess.Popen(command, env=environment)
        try:
            _follow(child, comparison.step)
        finally:
            child.terminate()
            code = child.wait()
    while comparison.step():
        pass
    found = {"exit": code, "seconds": round(time.perf_counter() - began), "continued_behind": before}
    found |= {"peak_disk": disk.all, "peak_disk_of_source": disk.source, "compared": len(comparison.notes)}
    print(json.dumps(found | (comparison.summary() if code == 0 else {})), flush=True)
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
    sys.exit(code)


def _follow(child: subprocess.Popen[bytes], step: Callable[[], bool]) -> None:
    while child.poll() is None:
        if not step():
            time.sleep(0.2)
