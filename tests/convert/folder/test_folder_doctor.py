"""`doctor` of quantized folders: blocks that Marlin loses, scales that engines cannot read, faults of each kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from helpers.ct_reader import tensors_of
from helpers.paths import GOLDEN
from mmquant.commands.cli import cli
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.folder.doctor import examine_folder
from mmquant.convert.folder.nearest import NearestVariant
from mmquant.convert.formats.nvfp4 import FORMAT
from mmquant.convert.open import open_native, open_source
from mmquant.errors import GateError, InputError
from mmquant.runs.folder import write_folder

E0 = "model.layers.0.block_sparse_moe.experts.0"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        open_native(GOLDEN / "source-bf16"), NearestVariant(FORMAT, 16), tmp_path_factory.mktemp("d") / "o"
    )


def spoiled(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> QuantizedFolder:
    tensors = tensors_of(folder)
    shutil.copytree(folder, out)
    for shard in out.glob("*.safetensors*"):
        shard.unlink()
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors")
    found = open_source(out)
    assert isinstance(found, QuantizedFolder)
    return found


def test_nothing_is_found_in_ours_nor_in_the_peers(ours: Path) -> None:
    for folder in (ours, GOLDEN / "peer-llmc-mf-nvfp4a16", GOLDEN / "peer-llmc-mf-mxfp4a16"):
        found = open_source(folder)
        assert isinstance(found, QuantizedFolder)
        assert examine_folder(found) == []


def marlin(scales: Tensor) -> Tensor:
    """vLLM 0.33's nvfp4_marlin_process_scales without its permutations, read back."""
    wide = scales.float() * 2**7
    factor = 1.0
    if float(wide.max()) < 448 * 2**7:
        factor = float(torch.exp2(torch.floor(torch.log2(448 * 2**7 / wide.max()))))
    wide = (scales.float() * factor).half() * 2**7
    wide[wide < 2] = 0
    return wide.float() / 2**7 / factor


def test_lost_blocks_are_those_that_marlin_zeroes(ours: Path, tmp_path: Path) -> None:
    """One expert has large weights, another small ones under global scales that hide it."""

    def narrow(tensors: dict[str, Tensor]) -> None:
        scale = tensors[f"{E0}.w2.weight_scale"].float()
        shrunk = torch.logspace(0, -5, scale.numel()).view(scale.shape) * scale
        tensors[f"{E0}.w2.weight_scale"] = shrunk.to(torch.float8_e4m3fn)

    source = spoiled(ours, tmp_path / "bad", narrow)
    (found,) = examine_folder(source)
    tensors, live, lost = tensors_of(tmp_path / "bad"), 0, 0
    for stack in (("w1", "w3"), ("w2",)):
        names = [n for n in tensors if n.endswith(tuple(f"{p}.weight_scale" for p in stack))]
        scales = torch.cat([tensors[n].float() for n in names])
        codes = torch.cat([tensors[n.replace("_scale", "_packed")] for n in names])
        holds = (codes & 0x77).unflatten(-1, (-1, 8)).any(-1)
        live += int(holds.sum())
        lost += int((holds & (marlin(scales) == 0)).sum())
    assert lost > 100
    assert found.level == "warning"
    assert f"writes {lost / live:.3%} of the experts' blocks as zero, most of" in found.text
    assert ".experts.*.w2" in found.text


def negative(tensors: dict[str, Tensor]) -> None:
    scale = tensors[f"{E0}.w1.weight_scale"]
    tensors[f"{E0}.w1.weight_scale"] = (-scale.float()).to(torch.float8_e4m3fn)


def parted(tensors: dict[str, Tensor]) -> None:
    tensors[f"{E0}.w3.weight_global_scale"] = tensors[f"{E0}.w3.weight_global_scale"] * 2


def zero(tensors: dict[str, Tensor]) -> None:
    tensors[f"{E0}.w2.weight_packed"] = torch.zeros_like(tensors[f"{E0}.w2.weight_packed"])


def broken(tensors: dict[str, Tensor]) -> None:
    tensors[f"{E0}.w2.weight_global_scale"] = torch.full((1,), torch.nan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (negative, "has negative block scales"),
        (parted, "have different global scales"),
        (zero, "experts.0.w2 is zero throughout"),
        (broken, "experts.0.w2.weight_global_scale is not finite"),
    ],
)
def test_faults_are_errors_and_exit_4(
    ours: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    found = examine_folder(spoiled(ours, tmp_path / "bad", change))
    assert any(words in f.text for f in found if f.level == "error"), found
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path / "bad"), "--json"])
    assert isinstance(result.exception, GateError)
    assert words in " ".join(f["text"] for f in json.loads(result.stdout)["findings"])


def test_bad_input(ours: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", str(ours)])
    assert result.exit_code == 0
    assert "nothing found" in result.stdout
    for place, more, words in (
        (ours, ["--text", "default"], "--text is for GGUF files, this is a safetensors folder"),
        (GOLDEN / "source-bf16", [], "not quantized below 8 bits"),
        (tmp_path / "nothing.gguf", [], "nothing.gguf"),
    ):
        result = CliRunner().invoke(cli, ["doctor", str(place), *more])
        assert isinstance(result.exception, InputError), result.output
        assert words in str(result.exception)
