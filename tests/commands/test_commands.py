"""Commands as processes: their folders, their exit codes, and kill -9 at any point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.command import mmquant
from helpers.killed import BYTES, command_killed_at
from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.checkpoint import open_checkpoint
from mmquant.convert.open import open_native
from mmquant.quantize.fp8 import dequantize_tiles


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest's time stamp."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    manifest = json.loads(found["mmquant.fit.json"])
    del manifest["generated"]
    return {**found, "mmquant.fit.json": json.dumps(manifest).encode()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()}


def test_fp8_block_holds_the_sources_values_exactly(tmp_path: Path) -> None:
    out = tmp_path / "m27-fp8"
    assert mmquant("fp8", "--model", "demo", "--out", out).returncode == 0
    source, written = open_native("demo"), tensors_of(out)
    for name in written:
        if name.endswith(".weight") and name + "_scale" in written:
            value = dequantize_tiles(written[name], written[name + "_scale"])
            assert torch.equal(value, source.read(name))
        elif not name.endswith("_scale"):
            assert torch.equal(written[name], source.raw(name))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (out / name).read_bytes() == source.small_file(name)


def test_native_is_a_verified_copy(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    assert mmquant("fp8", "--model", source, "--scheme", "native", "--out", out).returncode == 0
    for path in source.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    open_checkpoint(out).validate()


@pytest.mark.parametrize("arguments", [["fp8"], ["fp8", "--scheme", "channel"], ["int4", "--method", "rtn"]])
def test_a_second_run_changes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    command = [*arguments, "--model", "demo", "--out", tmp_path / "o", "--max-shard-size", "3MB"]
    first = mmquant(*command)
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'o'}\n")
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "o").iterdir()}
    assert mmquant(*command).returncode == 0
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "o").iterdir()} == before
    assert max(size for name, (_, size) in before.items() if name.endswith(".safetensors")) < 3.2e6


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Killed between two layers, before a shard gets its name, before the manifest, and in the middle of a shard."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 12, "num_hidden_layers": 4}
    source = write_tiny(tmp_path / "source", **sizes)
    arguments = ["int4", "--method", "rtn", "--model", source, "--group-size", "32", "--max-shard-size", "1MB"]
    assert mmquant(*arguments, "--out", tmp_path / "whole").returncode == 0
    points = {"rename .*progress": 4, "rename .*safetensors": 2, "open .*fit": 1, BYTES: 900_000}
    for number, (pattern, count) in enumerate(points.items()):
        cut = tmp_path / f"cut-{number}"
        command_killed_at(cut, pattern, count, *arguments, "--out", cut)
        assert cut.is_dir()
        assert not (cut / "mmquant.fit.json").exists()
        assert mmquant(*arguments, "--out", cut).returncode == 0
        assert contents(cut) == contents(tmp_path / "whole"), pattern


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert mmquant("fp8", "--model", "demo", "--out", out).returncode == 0
    other = mmquant("int4", "--method", "rtn", "--model", "demo", "--out", out)
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1
    assert "holds a finished run: the command fp8, now int4; choose another folder" in other.stderr
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    refused = mmquant("fp8", "--model", "demo", "--out", strange)
    assert refused.returncode == 2
    assert "holds notes.txt, expected an empty folder" in refused.stderr


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    shown = mmquant("fp8", "--model", "demo", "--out", tmp_path / "o", "--dry-run")
    assert shown.returncode == 0
    assert "15,543,232 bytes" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_inspect_prints_the_census() -> None:
    shown = mmquant("inspect", "demo", "--json")
    census = json.loads(shown.stdout)
    assert census["parameters"] == 14_438_208
    experts = next(kind for kind in census["kinds"] if kind["kind"] == "expert w1")
    assert (experts["count"], experts["dtype"], experts["bytes"]) == (64, "F8_E4M3", 4_194_304)
    assert "expert w1" in mmquant("inspect", "demo").stdout


def test_help_needs_no_torch_and_names_every_command() -> None:
    shown = mmquant("--help")
    assert shown.returncode == 0
    from mmquant.commands.cli import COMMANDS

    for name in COMMANDS:
        assert name in shown.stdout
    check = "import sys, mmquant, mmquant.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
