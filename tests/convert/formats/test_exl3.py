"""EXL3 folders: read as the description says, mixed widths and padding included; hostile ones give one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.exl3 import CONFIG, MARKERS, MCG, Parts, encode, random_parts, write_exl3
from helpers.tiny import write_tiny
from mmquant.calibration.model.engine_like import like_of
from mmquant.commands.cli import cli
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.fitting.artifact import read_artifact
from mmquant.convert.folder.doctor import examine_folder
from mmquant.convert.open import demo_folder, open_source
from mmquant.errors import InputError
from mmquant.quantize import trellis

MOE = "model.layers.0.block_sparse_moe"
UP = f"{MOE}.experts.3.w3"
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every width and codebook somewhere, attention's o as it was: a matrix of 16 bits."""
    kinds = [(16 * bits, book) for book in MARKERS for bits in range(1, 9)] + [(24, "mul1"), (40, "mul1"), (56, "mul1")]
    count = iter(range(1000))

    def made(name: str, values: Tensor) -> Parts | None:
        if name.endswith("o_proj"):
            return None
        number = next(count)
        return random_parts(values.shape, *kinds[number * 7 % len(kinds)], number)

    sizes = {"num_local_experts": 9, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}
    model = write_tiny(tmp_path_factory.mktemp("exl3") / "model", shards=1, **sizes)
    return write_exl3(model, model.parent / "exl3", made)


def opened(folder: Path) -> QuantizedFolder:
    found = open_source(folder)
    assert isinstance(found, QuantizedFolder)
    found.validate()
    return found


def test_every_matrix_is_read_by_its_own_tensors(whole: Path) -> None:
    """Padded sides are cut off; one by one as together; the codebook is the marker's, the width the trellis's."""
    source, tensors = opened(whole), load_file(whole / "model.safetensors")
    kinds: set[tuple[str, int]] = set()
    for name, stored in source.matrices.items():
        if stored.scheme is None:
            assert name.endswith(("o_proj", ".gate", "embed_tokens"))
            assert torch.equal(source.read(f"{name}.weight"), tensors[f"{name}.weight"].float())
            continue
        parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in ("trellis", "suh", "svh")}
        book = next((marker for marker in ("mul1", "mcg") if f"{name}.{marker}" in tensors), "3inst")
        full = trellis.matrix(parts["trellis"], parts["suh"].float(), parts["svh"].float(), book)
        assert torch.equal(source.read(f"{name}.weight"), full[: stored.shape[0], : stored.shape[1]])
        kinds.add((book, parts["trellis"].shape[2]))
    assert len(kinds) == 27
    names = [source.names.expert(0, expert, "down") for expert in (2, 7)]
    together = source.read_experts(0, "down", range(2, 8, 5), "cpu", torch.float32)
    assert torch.equal(together, torch.stack([source.read(f"{name}.weight") for name in names]))


def test_experts_stored_alike_are_read_together(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", shards=1, num_hidden_layers=1)
    seeds = iter(range(1000))
    out = write_exl3(model, tmp_path / "o", lambda name, v: random_parts(v.shape, 40, "mul1", next(seeds)))
    source = opened(out)
    together = source.read_experts(0, "gate", range(5), "cpu", torch.float32)
    for expert in range(5):
        assert torch.equal(together[expert], source.read(f"{MOE}.experts.{expert}.w1.weight"))
    assert float((together[0] - together[1]).norm()) > 0


def test_what_exllamav3_leaves_out_counts_as_zeros(whole: Path, tmp_path: Path) -> None:
    """Its MiniMax-M2 looks for the router's bias under a name that the release does not have."""
    source = opened(whole)
    name = f"{MOE}.{BIAS}"
    assert torch.equal(source.read(name), torch.zeros(9))
    line = f"{whole}: 1 tensors are left out, first {name}: exllamav3 computes this model without, as it is read here"
    assert source.notes == [line]
    assert [(f.level, f.text) for f in examine_folder(source)] == [("error", line.removeprefix(f"{whole}: "))]
    spoilt(whole, tmp_path, lambda tensors: tensors.update({name: torch.arange(9.0)}))
    again = opened(tmp_path / "o")
    assert again.read(name).tolist() == list(range(9))
    assert again.notes == []
    assert examine_folder(again) == []


def test_fit_and_profiles_of_vllm_do_not_take_it(whole: Path) -> None:
    with pytest.raises(
        InputError, match="exl3: runs under exllamav3, expected an artifact for vLLM, SGLang, mlx_lm or"
    ):
        read_artifact(whole)
    assert not like_of("vllm-h100").opens(opened(whole))


def test_inspect_counts_it(whole: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(whole), "--json"])
    assert done.exit_code == 0, done.exception
    kinds = {(k["kind"], k["dtype"]): k["count"] for k in json.loads(done.stdout)["kinds"]}
    assert kinds["attention", "I16"] == 3
    assert kinds["attention", "F16"] == 1
    assert kinds["expert w2", "I16"] == 9
    assert kinds["head", "I16"] == 1
    assert kinds["scale", "F16"] == 2 * (3 + 27 + 1)


def test_eval_of_a_folder_near_the_demo(tmp_path: Path) -> None:
    """Attention, head and the experts of two layers in 8 bits: a wrong order, sign or scale would make noise of it."""

    def made(name: str, values: Tensor) -> Parts | None:
        return encode(values) if ".experts." not in name or ".layers.1." in name else None

    out = write_exl3(demo_folder(), tmp_path / "exl3", made)
    arguments = ["eval", str(out), "--reference", "demo", "--windows", "3", "--context", "64", "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    assert 0.005 < result["kld"]["mean"] < 0.1
    assert result["top1"] > 0.8
    assert result["bytes"] == sum(t.numel() * t.element_size() for t in load_file(out / "model.safetensors").values())
    assert f"first model.layers.0.block_sparse_moe.{BIAS}" in done.stderr


@pytest.mark.parametrize("shape", [(128, 128), (96, 200), (384, 128)])
def test_the_tiny_encoder_is_near(shape: tuple[int, int]) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    parts = encode(weights)
    found = trellis.matrix(parts["trellis"], parts["suh"].float(), parts["svh"].float(), "mul1")[: shape[0], : shape[1]]
    assert float((found - weights).norm() / weights.norm()) < 0.06


def spoilt(whole: Path, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(whole, tmp_path / "o")
    tensors = load_file(tmp_path / "o/model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "o/model.safetensors")
    return tmp_path / "o"


def changed(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for marker in ("mul1", "mcg"):
            tensors.pop(f"{UP}.{marker}", None)
        tensors |= {f"{UP}.{name}": value for name, value in random_parts((160, 128), 64, "mul1").items()}
        tensors[f"{UP}.{suffix}"] = change(tensors.get(f"{UP}.{suffix}", torch.zeros(())))

    return spoil


def without(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        changed(suffix, torch.clone)(tensors)
        del tensors[f"{UP}.{suffix}"]

    return spoil


def infinite(suh: Tensor) -> Tensor:
    suh[5] = torch.inf
    return suh


EIGHT, HALVES = torch.zeros(8, 16, 136, dtype=torch.int16), torch.zeros(8, 16, 40, dtype=torch.int16)
BROKEN = {
    "nine bits": (changed("trellis", lambda _: EIGHT), f"{UP}.trellis has shape [8, 16, 136], expected [inputs / 16"),
    "four and a half": (changed("trellis", lambda _: EIGHT[..., :72].clone()), "K 1 to 8, or 1.5, 2.5, 3.5"),
    "no bits": (changed("trellis", lambda _: EIGHT[..., :0].clone()), "has shape [8, 16, 0], expected"),
    "flat": (changed("trellis", torch.flatten), f"{UP}.trellis has shape [8192], expected [inputs / 16"),
    "transposed": (changed("trellis", lambda t: t.transpose(0, 1).contiguous()), "[16, 8, 64], expected [8, 16, 64]"),
    "dtype": (changed("trellis", lambda t: t.view(torch.float16)), "has dtype F16, expected I16"),
    "short suh": (changed("suh", lambda s: s[:100].clone()), f"{UP}.suh has shape [100], expected [128]"),
    "svh in float32": (changed("svh", torch.Tensor.float), f"{UP}.svh has dtype F32, expected F16"),
    "infinite": (changed("suh", infinite), f"{UP}.suh is not finite"),
    "two markers": (changed("mcg", lambda _: MCG.clone()), f"{UP}.mcg is there beside mul1, expected one codebook"),
    "other multiplier": (changed("mul1", lambda m: m + 1), f"{UP}.mul1 is 0x83dcd12e, expected 0x83dcd12d"),
    "marker of a list": (changed("mul1", lambda m: m.repeat(2)), f"{UP}.mul1 has shape [2], expected []"),
    "no svh": (without("svh"), f"{UP}.svh is missing (mul1, suh, trellis is there, exl3-mul1 wants it)"),
    "no trellis": (without("trellis"), f"{UP}.trellis is missing"),
    "bias": (changed("bias", lambda _: torch.zeros(160)), f"tensors are not part of this model, first {UP}.bias"),
    "half bits without mul1": (
        lambda tensors: (changed("trellis", lambda _: HALVES)(tensors), tensors.pop(f"{UP}.mul1"))[0],
        "expected [inputs / 16, outputs / 16, 16 K] with K 1 to 8",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tensors_give_one_line(whole: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BROKEN[name]
    folder = spoilt(whole, tmp_path, spoil)
    with pytest.raises(InputError) as caught:
        opened(folder).read(f"{UP}.weight")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value) or str(folder) in str(caught.value)


@pytest.mark.parametrize("more", [{"bits": "many"}, {"codebook": 7}, {"bits": 3.07, "head_bits": None}, {}])
def test_what_config_says_of_bits_decides_nothing(whole: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """As in exllamav3: the tensors do."""
    shutil.copytree(whole, tmp_path / "o")
    config = json.loads((tmp_path / "o/config.json").read_text())
    config["quantization_config"] = {"quant_method": CONFIG["quant_method"], **more}
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    assert torch.equal(opened(tmp_path / "o").read(f"{UP}.weight"), opened(whole).read(f"{UP}.weight"))


def test_a_lost_config_is_said(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "o")
    config = json.loads((tmp_path / "o/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"suh, svh, trellis, but config.json has no quantization_config: it was lost"):
        open_source(tmp_path / "o").validate()
