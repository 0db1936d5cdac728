"""Benchmarks that need a graphics card at full size: their code path at a small size on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"
SMALL = "--hidden 256 --width 128 --experts 8 --chosen 2 --heads 4 --group-of-heads 2 --head-dim 32"


def test_a_whole_int4_layer_is_measured_part_by_part() -> None:
    command = [sys.executable, BENCH / "int4_whole.py", "--device", "cpu", *SMALL.split()]
    done = subprocess.run([*command, "--tokens", "1024", "--context", "128"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[2:10]]
    names = ["read FP8", "to the device, dequantize", "forward", "moments", "solve", "pack", "write", "sum"]
    assert [name for name, _, _ in rows] == names
    assert all(float(floor) >= 0 for _, _, floor in rows)
    assert "the shipped step" in done.stdout
