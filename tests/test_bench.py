"""Benchmarks that need a graphics card run their code path at a small size on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"
SMALL = "--hidden 256 --width 128 --experts 8 --chosen 2 --heads 4 --group-of-heads 2 --head-dim 32"


def test_a_whole_int4_layer_is_measured_part_by_part() -> None:
    command = [sys.executable, BENCH / "int4_whole.py", "--device", "cpu", *SMALL.split()]
    done = subprocess.run([*command, "--tokens", "1024", "--context", "128"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[2:9]]
    names = ["read FP8, dequantize", "forward", "moments", "solve", "pack", "write", "sum"]
    assert [name for name, _, _ in rows] == names
    assert all(float(floor) >= 0 for _, _, floor in rows)
    assert "the shipped step" in done.stdout


def test_error_feedback_is_measured_by_the_shipped_solve() -> None:
    command = [sys.executable, BENCH / "gguf_layer.py", "--device", "cpu", "--experts", "3", "--hidden", "256"]
    command += ["--width", "256", "--kind", "Q4_K", "IQ2_XXS", "--passes", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:10]]
    assert [row[:4] for row in rows[:3]] == [
        ["Q4_K", "w1+w3", "0", "3"],
        ["Q4_K", "w1+w3", "1", "3"],
        ["IQ2_XXS", "w1+w3", "0", "3"],
    ]
    for row in rows:
        correct, factor, columns, whole = map(float, row[4:8])
        assert 0 <= columns < whole
        assert correct + factor + columns <= whole + 0.02  # printed with two places
    losses = {tuple(row[:3]): float(row[9]) for row in rows}
    assert all(losses[kind, role, "1"] < losses[kind, role, "0"] for kind, role, _ in losses)
    assert "62 layers" in done.stdout.splitlines()[-1]


def test_two_checkouts_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """The same checkout twice is equal; a byte, a key of the manifest and a file that differ are each named."""
    sys.path.insert(0, str(BENCH))
    try:
        same_bytes = importlib.import_module("same_bytes")
    finally:
        sys.path.remove(str(BENCH))
    root = str(BENCH.parent)
    command = [sys.executable, BENCH / "same_bytes.py", root, root, "--only", "fp8-native", "--keep", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[::2] == ["fp8-native", "equal"]
    before, after = tmp_path / "before" / "fp8-native", tmp_path / "after" / "fp8-native"
    manifest = json.loads((after / "mmquant.fit.json").read_text())
    (after / "mmquant.fit.json").write_text(json.dumps(manifest | {"generated": "another day"}))
    assert same_bytes.compare(before, after)[1] == "equal"
    shard = next(after.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert same_bytes.compare(before, after)[1] == f"{shard.name}: byte {len(data) - 3:,} of {len(data):,}"
    manifest["artifacts"][0]["files"][1]["size"] = 7
    (after / "mmquant.fit.json").write_text(json.dumps(manifest))
    assert "mmquant.fit.json: artifacts.0.files.1.size" in same_bytes.compare(before, after)[1]
    (after / "more").touch()
    assert same_bytes.compare(before, after)[1] == "more is in the second alone"
