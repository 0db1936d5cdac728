"""MXFP4 against llm-compressor's folder of the same weights, compressed-tensors' decompressor and the definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from helpers.ct_reader import dequantized, tensors_of
from helpers.paths import GOLDEN
from mmquant.commands.cli import cli
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.nearest import NearestVariant
from mmquant.convert.formats.format import Scheme
from mmquant.convert.formats.mxfp4 import FORMAT
from mmquant.convert.open import open_native, open_source
from mmquant.errors import InputError
from mmquant.runs.folder import write_folder

PEER = GOLDEN / "peer-llmc-mf-mxfp4a16"
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_native(GOLDEN / "source-bf16")
    return write_folder(source, NearestVariant(FORMAT, 32, attention=True), tmp_path_factory.mktemp("mxfp4") / "out")


def test_every_tensor_is_the_peers(ours: Path) -> None:
    mine, theirs = tensors_of(ours), tensors_of(PEER)
    assert set(mine) == set(theirs)
    for name, tensor in theirs.items():
        assert tensor.dtype == mine[name].dtype, name
        assert torch.equal(tensor, mine[name]), name


def test_config_is_the_peers(ours: Path) -> None:
    mine, theirs = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (ours, PEER))
    assert set(theirs.pop("ignore")) <= set(mine.pop("ignore"))
    for config in (mine, theirs):
        del config["version"]
    assert mine == theirs


@pytest.mark.parametrize("whose", ["ours", "peer"])
def test_read_as_compressed_tensors_reads(ours: Path, whose: str) -> None:
    folder = ours if whose == "ours" else PEER
    read = open_source(folder)
    assert isinstance(read, QuantizedFolder)
    for name, tensor in dequantized(folder).items():
        assert torch.equal(read.read(name), tensor), name
    stack = read.read_experts(0, "down", range(1, 4), "cpu", torch.float32)
    assert torch.equal(stack[2], read.read("model.layers.0.block_sparse_moe.experts.3.w2.weight"))


def test_check_and_inspect_know_it(ours: Path, tmp_path: Path) -> None:
    assert check_folder(ours, open_native(GOLDEN / "source-bf16")) == 4 + 3 * 4
    result = CliRunner().invoke(cli, ["inspect", str(ours)], catch_exceptions=False)
    assert result.exit_code == 0
    alone = write_folder(open_native(GOLDEN / "source-bf16"), NearestVariant(FORMAT, 32), tmp_path / "experts")
    found = open_source(alone)
    assert isinstance(found, QuantizedFolder)
    assert found.matrices["model.layers.0.self_attn.q_proj"].scheme is None


def nearest(value: float, top: float) -> float:
    """By the definition, in double precision: of equally near levels the one with the even code."""
    mantissa, exponent = torch.frexp(torch.tensor(top, dtype=torch.float64))
    power = int(exponent) - 3 + (float(mantissa) >= 0.875)
    scale = 2.0**power
    code = min(range(8), key=lambda c: (abs(abs(value) / scale - LEVELS[c]), c % 2))
    return LEVELS[code] * scale * (-1 if value < 0 else 1)


def test_rounding_is_the_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 2.0**-40, 2.0**60, 0.0]).view(4, 1, 1)
    weights = torch.randn(4, 4, 64, generator=generator) * scales
    weights[0, 0, :32] = torch.tensor(
        [6.0, *[sign * x for x in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0) for sign in (1, -1)], *[0.0] * 17]
    )
    weights[0, 1, 0], weights[0, 2, 0] = 7.0, 6.99  # mantissa 1.75 and just below it
    scheme = Scheme(FORMAT, 4, 32)
    packed = FORMAT.nearest(["a"] * 4, weights, scheme) if FORMAT.nearest else {}
    read = FORMAT.unpack(scheme, (4, 64), lambda suffix: packed[suffix])
    groups, back = weights.unflatten(-1, (-1, 32)).flatten(0, -2), read.unflatten(-1, (-1, 32)).flatten(0, -2)
    for group, found in zip(groups.tolist(), back.tolist(), strict=True):
        top = max(map(abs, group))
        assert found == [nearest(value, top) if top else 0.0 for value in group]


def test_scales_may_be_e8m0_and_must_be_numbers(tmp_path: Path) -> None:
    config = json.loads((PEER / "config.json").read_text())
    tensors, name = tensors_of(PEER), "model.layers.0.self_attn.k_proj"
    as_e8m0 = tmp_path / "e8m0"
    shutil.copytree(PEER, as_e8m0)
    typed = {n: t.view(torch.float8_e8m0fnu) if n.endswith("weight_scale") else t for n, t in tensors.items()}
    save_file(typed, as_e8m0 / "model.safetensors")
    assert torch.equal(open_source(as_e8m0).read(name + ".weight"), open_source(PEER).read(name + ".weight"))
    tensors[name + ".weight_scale"][3, 2] = 255
    save_file(tensors, as_e8m0 / "model.safetensors")
    with pytest.raises(InputError, match=r"k_proj\.weight_scale is not finite"):
        open_source(as_e8m0).read(name + ".weight")
    group = next(iter(config["quantization_config"]["config_groups"].values()))
    group["weights"]["group_size"] = 16
    (as_e8m0 / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="in groups of 16 in MXFP4A16, expected 32"):
        open_source(as_e8m0)
