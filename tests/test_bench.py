"""Benchmarks that need a graphics card run their code path at a small size on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mmquant
from helpers.hub_server import HubServer
from mmquant.convert.hub.store import HEADER_GUESS

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
        ["Q4_K", "gate+up", "0", "3"],
        ["Q4_K", "gate+up", "1", "3"],
        ["IQ2_XXS", "gate+up", "0", "3"],
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
    assert same_bytes.compare(before, after)[1] == []
    shard = next(after.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert same_bytes.compare(before, after)[1] == [f"{shard.name}: byte {len(data) - 3:,} of {len(data):,}"]
    manifest["artifacts"][0]["files"][1]["size"] = 7
    (after / "mmquant.fit.json").write_text(json.dumps(manifest))
    assert "mmquant.fit.json: artifacts.0.files.1.size" in same_bytes.compare(before, after)[1][0]
    (after / "more").touch()
    assert same_bytes.compare(before, after)[1][-1] == "more is in the second alone"


SAMPLED = 8  # vectors that tell checkpoints apart, and the tokenizer
SMALL_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 80,
    "num_experts_per_tok": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
}


def test_a_rehearsed_checkpoint_is_served_and_quantized_as_if_it_were_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any range of a shard equals the same bytes of the whole; the hub's digests are true; the artifact is whole."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    rehearsal, shards = (importlib.import_module(f"bench.rehearsal.{name}") for name in ("serve", "shard"))
    model = importlib.import_module("bench.rehearsal.model").Model(2, tuple(SMALL_MODEL.items()), 65)
    shard = shards.Shard(model.layouts[1])
    whole = bytes(shard[:])
    for start, stop in ((0, 9), (7, len(shard.layout.header) + 3), (1001, 70_002), (len(shard) - 5, len(shard))):
        assert bytes(shard[start:stop]) == whole[start:stop]
    assert bytes(shards.Shard(model.layouts[1], seed=1)[:]) != whole
    with HubServer() as hub:
        rehearsal.publish(hub, model, shards.Digests(tmp_path / "digests.json"))
        hub.use(monkeypatch, tmp_path)
        done = mmquant.quantize_fp8(f"hf:{rehearsal.REPOSITORY}", tmp_path / "out")
    assert done.path is not None
    source = mmquant.open_model(str(done.path))
    last = source.read("model.layers.1.block_sparse_moe.experts.61.w3.weight")
    assert 0.015 < float(last.std()) / 2**15 < 0.025  # tiles of 0.75 to 1.25 times 0.02
    first = source.read("model.layers.0.block_sparse_moe.experts.61.w3.weight")
    assert 0.015 < float(first.std()) < 0.025
    assert float(first.abs().max()) > 4 * float(first.std())


def test_steps_from_headers_ask_for_each_shards_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command fetches the beginning of every shard, those after it none; nothing else of a shard is read."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    rehearsal, shards = (importlib.import_module(f"bench.rehearsal.{name}") for name in ("serve", "shard"))
    model = importlib.import_module("bench.rehearsal.model").Model(2, tuple(SMALL_MODEL.items()), 65)
    name, recipe = f"hf:{rehearsal.REPOSITORY}", tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {name}\nvariants:\n  fp8: {{command: fp8}}\n  Q8_0: {{command: gguf, type: Q8_0}}\n")
    out = tmp_path / "out"
    steps: list[Callable[[], object]] = [
        lambda: mmquant.inspect(name),
        lambda: mmquant.fit(name),
        lambda: mmquant.quantize_fp8(name, out, dry_run=True),
        lambda: mmquant.quantize_int4(name, out, mmquant.Int4Options(method="rtn", group_size=32), dry_run=True),
        lambda: mmquant.quantize_gguf(name, out, mmquant.GgufOptions(type="Q8_0"), dry_run=True),
        lambda: mmquant.run(recipe, out, dry_run=True),
    ]
    with HubServer() as hub:
        rehearsal.publish(hub, model, shards.Digests(tmp_path / "digests.json"))
        hub.use(monkeypatch, tmp_path)
        headers = sum(len(layout.header) for layout in model.layouts)
        for number, step in enumerate(steps):
            hub.log.clear()
            hub.sent = 0
            step()
            assert len(hub.calls(r"/cdn/")) <= (len(model.layouts) + SAMPLED if number == 0 else 1)
            assert len(hub.calls("")) <= 2 * len(model.layouts) + 25
            assert hub.sent <= len(model.layouts) * HEADER_GUESS + 10**6
        assert headers < len(model.layouts) * HEADER_GUESS
        assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_rehearsal_has_the_releases_size() -> None:
    """Numbers of the release: 230.1 GB in 125 shards, 95,000 tensors of experts."""
    sys.path.insert(0, str(BENCH.parent))
    try:
        model = importlib.import_module("bench.rehearsal.model").Model()
    finally:
        sys.path.remove(str(BENCH.parent))
    layouts = model.layouts
    names = [piece.name for layout in layouts for piece in layout.pieces]
    assert (len(layouts), len(names), len(set(names))) == (125, 96_103, 96_103)
    assert sum(".experts." in name for name in names) == 62 * 256 * 3 * 2
    assert 230.1e9 < sum(layout.bytes for layout in layouts) < 230.2e9
    known = json.loads((BENCH / "rehearsal" / "digests.json").read_text())
    shards = importlib.import_module("bench.rehearsal.shard")
    assert all(shards.Shard(layout).identity in known for layout in layouts)


@pytest.mark.slow
def test_ranks_are_measured_stage_by_stage_and_compared(tmp_path: Path) -> None:
    """Two gloo ranks beside one: every stage has its seconds, and what both find is near."""
    command = [sys.executable, BENCH / "multi_gpu.py", "--device", "cpu", "--json", tmp_path / "found.json"]
    command += [
        *SMALL.split(),
        "--width",
        "256",
        "--head-dim",
        "64",
        "--context",
        "64",
        "--windows",
        "4",
        "--judged",
        "4",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "found.json").read_text())
    assert [run["ranks"] for run in runs] == [1, 2]
    names = [set(run["stages"][0]) for run in runs]
    assert names[0] == names[1]
    assert len(names[0]) == 14
    for run in runs:
        for stages in run["stages"]:
            assert all(0 <= inside <= seconds + 1e-6 for seconds, inside, _ in stages.values())
    sent = sum(stages["calibrate: sums to owners"][2] for stages in runs[1]["stages"])
    assert sent >= 8 * 4 * 2 * 256**2  # half of each rank's sums
    for name, limit in (("moments", 1e-5), ("eval", 1e-4), ("int4", 1e-2), ("nvfp4", 1e-2), ("gguf", 0.2)):
        assert runs[1]["results"][name] == pytest.approx(runs[0]["results"][name], rel=limit), name
