"""auto-gptq 0.7.1 reads our GPTQ tensors and would have written the same words (make test-peers)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.ct_reader import tensors_of
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.open import open_native, open_source
from mmquant.quantize.integer.grid import IntWeight, dequantize
from mmquant.quantize.integer.pack import pack_gptq, pack_gptq_zeros
from mmquant.quantize.integer.rtn import rtn_int
from mmquant.runs.folder import write_folder

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".peers" / "auto-gptq" / "bin" / "python"
GOLDEN = HERE.parent / "data" / "golden"

pytestmark = pytest.mark.peers


def auto_gptq(tensors: dict[str, Tensor], folder: Path, bits: int, group_size: int) -> dict[str, Tensor]:
    """What auto-gptq makes of GPTQ tensors, in its own environment."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing; `make test-peers` installs it")
    save_file(tensors, folder / "in.safetensors")
    arguments = [folder / "in.safetensors", folder / "out.safetensors", bits, group_size]
    done = subprocess.run(
        [PYTHON, "-W", "ignore", HERE / "auto_gptq_read.py", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


def gptq_tensors(weight: IntWeight) -> dict[str, Tensor]:
    """One matrix as GPTQ files hold it (checkpoint_format gptq, v1)."""
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.int8)
    inputs = weight.codes.shape[1]
    return {
        "m.qweight": pack_gptq(weight.codes, weight.bits),
        "m.qzeros": pack_gptq_zeros(zeros, weight.bits).contiguous(),
        "m.scales": weight.scales.to(torch.float16).T.contiguous(),
        "m.g_idx": torch.arange(inputs, dtype=torch.int32) // weight.group_size,
    }


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 128), (8, 64)])
def test_it_reads_our_tensors(bits: int, group_size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(bits * group_size)
    weight = rtn_int(torch.randn(96, 256, generator=generator) * 0.05, bits, group_size)
    tensors = gptq_tensors(weight)
    read = auto_gptq(tensors, tmp_path, bits, group_size)
    assert torch.allclose(read["m.weight"], dequantize(weight), rtol=2**-10, atol=0)  # scales are float16 in the file
    assert torch.equal(read["m.qweight"], tensors["m.qweight"])
    assert torch.equal(read["m.qzeros"], tensors["m.qzeros"])


def test_it_reads_zero_points(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 128, generator=generator).abs() * 0.05  # all positive: zero points far from the middle
    quantized = rtn_int(weight, 4, 32, symmetric=False)
    assert quantized.zeros is not None
    read = auto_gptq(gptq_tensors(quantized), tmp_path, 4, 32)
    assert torch.allclose(read["m.weight"], dequantize(quantized), rtol=2**-10, atol=0)


def test_it_reads_autorounds_file(tmp_path: Path) -> None:
    """The bridge is right: another tool's GPTQ checkpoint comes back within four-bit error of its source."""
    stored = tensors_of(GOLDEN / "peer-autoround-gptq-g128")
    name = "model.layers.0.self_attn.q_proj"
    tensors = {key.replace(name, "m"): tensor for key, tensor in stored.items() if key.startswith(name + ".")}
    read = auto_gptq(tensors, tmp_path, 4, 128)["m.weight"]
    weight = tensors_of(GOLDEN / "source-bf16")[name + ".weight"].float()
    assert 0.05 < (read - weight).norm() / weight.norm() < 0.12


def test_it_reads_every_matrix_of_our_folder(tmp_path: Path) -> None:
    variant = WeightsVariant(group_size=64, attention="int4", layout="gptq", symmetric=True)
    folder = write_folder(open_native(GOLDEN / "source-bf16"), variant, tmp_path / "out")
    stored = {name: tensor for name, tensor in tensors_of(folder).items() if not name.endswith(".weight")}
    read, ours = auto_gptq(stored, tmp_path, 4, 64), open_source(folder)
    names = [name for name in stored if name.endswith(".qweight")]
    assert len(names) == 16  # four of attention, three of each of the four experts
    for name in names:
        weight = name.replace(".qweight", ".weight")
        assert torch.equal(read[weight], ours.read(weight)), name
        assert torch.equal(read[name], stored[name]), name
