"""Calibration cases: a tiny model, a corpus of random tokens, and runs in separate processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.killed import forked
from helpers.tiny import write_tiny
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.calibration.statistics.live import PassOptions
from mmquant.calibration.statistics.run import calibrate_into
from mmquant.calibration.text.corpus import Corpus
from mmquant.convert.open import open_native


def model(folder: Path, layers: int = 3) -> Path:
    """A tiny checkpoint whose last expert is never chosen."""
    return write_tiny(folder / "model", hidden_size=64, intermediate_size=40, num_hidden_layers=layers, vocab_size=96)


def corpus(windows: int = 7, context: int = 12, seed: int = 0) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (windows, context), generator=generator)
    sets = [{"name": "a", "sha256": "0" * 64, "weight": None, "documents": 1, "windows": windows}]
    return Corpus(tokens, torch.arange(windows) % 2, ("a", "b"), {"sets": sets, "seed": seed})


def options(**changes: Any) -> PassOptions:
    return PassOptions(**{"collect": Collect(), "batch": 3, **changes})


def run(model: Path, out: Path, windows: int = 7, dtype: str = "float32", **changes: Any) -> list[LayerStatistics]:
    """A whole run in this process."""
    return list(calibrate_into(open_native(model), corpus(windows), out, options(**changes), dtype=dtype))


def begin(model: Path, out: Path, layers: int = 2) -> None:
    """A run that stops behind so many layers."""
    steps = calibrate_into(open_native(model), corpus(), out, options())
    for _ in range(layers):
        next(steps)


def ranks(size: int, work: Callable[[], object]) -> None:
    """`work` in `size` gloo processes; AssertionError when one fails."""
    assert exit_codes(size, work) == [0] * size


def exit_codes(size: int, work: Callable[[], object]) -> list[int | None]:
    """How each of `size` gloo processes ends that do `work`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        from mmquant.calibration.model.distributed import leave

        work()
        leave()

    processes = [forked(child, rank) for rank in range(size)]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dataclasses by dotted name."""
    out: dict[str, Tensor] = {}
    for field in fields(value):
        part, where = getattr(value, field.name), f"{name}{field.name}"
        if isinstance(part, Tensor):
            out[where] = part
        elif is_dataclass(part):
            out |= tensors(part, where + ".")
    return out


def files(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves, by name."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
