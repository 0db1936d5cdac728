"""What a run will take, for its dry run: download, disk, memory, passes over the source, time by measured rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mmquant.tables import Size, gib, table

from ..convert.checkpoints.checkpoint import Checkpoint
from .place import free_bytes

WORK = 2 << 30  # bytes beside the layers: the process, its buffers, encoders
WIDE = {"cpu": 4, "cuda": 2}  # bytes of a dequantized weight
METHOD = "gptq"  # whose figure is that of the whole run
UNKNOWN = "not measured"


@dataclass(frozen=True)
class Needs:
    """Bytes, passes and seconds of one run. disk: its peak, output and shards on their way; free: what the disk has.

    memory: of the device at its peak, estimated: two layers dequantized, one written, and working space.
    seconds: None where no bench has a figure; basis: what the time is made of.
    """

    output: int
    download: int
    disk: int
    free: int
    device: str
    ram: int
    gpu: int
    passes: int
    seconds: float | None
    basis: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def lines(self, fits: str) -> list[str]:
        """The table that every dry run prints."""
        rows: list[list[object]] = [
            ["output", Size(self.output), ""],
            ["download", Size(self.download), "of a hub; nothing for a folder"],
            ["disk peak", Size(self.disk), f"{self.free / 1e9:,.1f} GB are free"],
            ["RAM", Size(self.ram), f"{gib(self.ram)}, estimated"],
            ["GPU memory", Size(self.gpu), f"{gib(self.gpu)}, estimated; {self.device}"],
        ]
        time = UNKNOWN if self.seconds is None else duration(self.seconds)
        rest = [f"passes over the source: {self.passes}", f"time: {time} ({self.basis})", f"fits: {fits}"]
        return [*table(["needs", "GB", "what"], rows, text=("needs", "what")), *rest]


def needs_of(source: Checkpoint, out: Path, size: int, device: str, rate: str = "", passes: int = 1) -> Needs:
    """The needs of writing `size` bytes of `source` into `out`.

    rate: the type or method whose measured rate gives the time.
    """
    g = source.geometry
    kind = "cuda" if device.startswith("cuda") else "cpu"
    layer = (g.expert_weights + g.attention_weights) // g.layers
    peak = 2 * layer * WIDE[kind] + size // g.layers + WORK
    download = 0 if source.store.is_local else source.bytes * passes
    seconds = seconds_of(source, device, rate)
    where = (
        "one core, encoding alone: bench/RESULTS.md" if kind == "cpu" else "one H100, encoding alone: bench/RESULTS.md"
    )
    where = "one H100: docs/lab.md" if rate == METHOD else where
    return Needs(
        output=size,
        download=download,
        disk=size + source.store.in_flight(),
        free=free_bytes(out),
        device=device,
        ram=peak if kind == "cpu" else WORK + size // g.layers,
        gpu=peak if kind == "cuda" else 0,
        passes=passes,
        seconds=seconds,
        basis=where if seconds is not None else "no benchmark has this run",
    )


def seconds_of(source: Checkpoint, device: str, rate: str) -> float | None:
    """Seconds of quantizing the whole model at a measured rate, None where there is none."""
    figure = rates()["cuda" if device.startswith("cuda") else "cpu"].get(rate)
    return None if figure is None else source.geometry.parameters / figure / 1e6


@lru_cache(maxsize=1)
def rates() -> dict[str, dict[str, float]]:
    """Million weights a second by device and by type or method."""
    return yaml.safe_load(resources.files("mmquant").joinpath("data", "fit", "bench.yaml").read_text())


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
