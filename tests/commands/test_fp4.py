"""`mmquant nvfp4` and `mxfp4`: contradicting options, calibrated folders as engines read them, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers.ct_reader import dequantized, tensors_of
from helpers.killed import check_continued
from helpers.tiny import few, write_code, write_tokenized
from mmquant.commands.cli import cli
from mmquant.convert import manifest
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.doctor import examine_folder
from mmquant.convert.open import open_native, open_source
from mmquant.errors import InputError

BAD = [
    ("nvfp4", ["--format", "modelopt", "--attention", "fp8"], "only compressed-tensors holds FP8 beside NVFP4"),
    ("nvfp4", ["--format", "modelopt", "--kv-cache", "fp8"], "expected compressed-tensors"),
    ("nvfp4", ["--activations", "nvfp4", "--method", "rtn"], "the scales are calibrated, expected gptq"),
    ("nvfp4", ["--method", "rtn", "--effort", "high"], "rounding to nearest is not refined, expected gptq"),
    ("nvfp4", ["--method", "rtn", "--text", "x"], "--text has no effect with --method rtn"),
    ("nvfp4", ["--statistics", "x", "--windows", "4"], "--windows has no effect with --statistics"),
    ("nvfp4", ["--effort", "high", "--statistics", "nowhere"], "needs the calibration tokens"),
    ("nvfp4", ["--tp", "32"], "group size 16: 256/32 = 8 is not a multiple of it"),
    ("mxfp4", ["--tp", "16"], "group size 32: 256/16 = 16 is not a multiple of it"),
    ("mxfp4", ["--kv-cache", "fp8", "--method", "rtn"], "the scales are calibrated, expected gptq"),
    ("mxfp4", ["--statistics", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("command", "arguments", "words"), BAD)
def test_one_line_for_bad_input(tmp_path: Path, command: str, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, [command, "--model", "demo", "--out", str(tmp_path / "o"), *arguments])
    assert isinstance(result.exception, (InputError, ValueError)), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.glob("o/*.safetensors"))


@pytest.mark.parametrize("command", [["nvfp4"], ["nvfp4", "--activations", "nvfp4", "--format", "modelopt"], ["mxfp4"]])
def test_dry_run_writes_nothing(tmp_path: Path, command: list[str]) -> None:
    result = CliRunner().invoke(cli, [*command, "--model", "demo", "--out", str(tmp_path / "o"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "bytes into" in result.output
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenized(tmp_path_factory.mktemp("fp4") / "model", hidden_size=128, intermediate_size=96)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_code(tmp_path_factory.mktemp("text") / "text.txt")


KINDS = [
    ("nvfp4", ["--attention", "nvfp4", "--activations", "nvfp4"]),
    ("nvfp4", ["--attention", "nvfp4", "--activations", "nvfp4", "--format", "modelopt"]),
    ("nvfp4", ["--attention", "fp8", "--kv-cache", "fp8"]),
    ("mxfp4", ["--attention", "mxfp4", "--tp", "1"]),
]


@pytest.mark.parametrize(("command", "arguments"), KINDS)
def test_calibrated_folders_are_read_as_meant(
    tmp_path: Path, model: Path, text: Path, command: str, arguments: list[str]
) -> None:
    result = CliRunner().invoke(cli, [command, *few(model, text), *arguments, "--out", str(tmp_path / "o")])
    assert result.exception is None, result.output
    source, found = open_native(model), open_source(tmp_path / "o")
    assert isinstance(found, QuantizedFolder)
    assert check_folder(tmp_path / "o", source) == 2 * (4 + 3 * 4)
    assert examine_folder(found) == []
    for name in (n for n in found.matrices if ".experts." in n):
        error = found.read(name + ".weight") - source.read(name + ".weight")
        assert float(error.norm() / source.read(name + ".weight").norm()) < 0.25, name
    if "modelopt" not in arguments:
        for name, tensor in dequantized(tmp_path / "o").items():
            assert torch.equal(found.read(name), tensor), name
    written = manifest.read(tmp_path / "o")
    assert written is not None
    label = {"nvfp4": "NVFP4A4-gptq" if "--activations" in arguments else "NVFP4A16-gptq", "mxfp4": "MXFP4A16-gptq"}
    assert written["artifacts"][0]["quant_label"] == label[command]
    assert written["artifacts"][0]["requires"]["tensor_parallel_allowed"] == [1, 2] if command == "nvfp4" else [1]


def test_input_scales_are_shared_as_engines_take_them(tmp_path: Path, model: Path, text: Path) -> None:
    out = tmp_path / "o"
    arguments = ["nvfp4", *few(model, text), "--activations", "nvfp4", "--out", str(out)]
    assert CliRunner().invoke(cli, arguments).exception is None
    tensors = tensors_of(out)
    for layer in (0, 1):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        entering = {float(tensors[f"{stem}.{e}.{p}.input_global_scale"]) for e in range(4) for p in ("w1", "w3")}
        assert len(entering) == 1
        between = torch.cat([tensors[f"{stem}.{e}.w2.input_global_scale"] for e in range(4)])
        assert bool((torch.isfinite(between) & (between > 0)).all())
        assert len(set(between.tolist())) > 1
    group = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["NVFP4A4"]
    assert group["input_activations"]["dynamic"] == "local"


def test_a_killed_run_continues_with_equal_bytes(tmp_path: Path, model: Path, text: Path) -> None:
    check_continued(tmp_path, "nvfp4", *few(model, text), "--activations", "nvfp4", "--device", "cpu")
