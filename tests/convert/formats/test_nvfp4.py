"""NVFP4 against llm-compressor's folder of the same weights, compressed-tensors' decompressor and the definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor

from helpers.ct_reader import dequantized, tensors_of
from helpers.paths import GOLDEN
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.folder.check import check_folder
from mmquant.convert.folder.nearest import NearestVariant
from mmquant.convert.folder.packing import stacked_tensors
from mmquant.convert.folder.schemes import stacks
from mmquant.convert.formats import modelopt, nvfp4
from mmquant.convert.formats.format import Format, Scheme
from mmquant.convert.formats.skip_lists import ENGINES, SGLANG, VLLM, names_of
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.open import open_native, open_source
from mmquant.errors import InputError
from mmquant.quantize.fp4.levels import from_nibbles, nearest
from mmquant.runs.folder import write_folder

PEER = GOLDEN / "peer-llmc-mf-nvfp4a16"
ROWS = {"compressed-tensors": nvfp4.FORMAT, "modelopt": modelopt.FORMAT}
FUSED = [("w1", "w3"), ("q_proj", "k_proj"), ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source, folder = open_native(GOLDEN / "source-bf16"), tmp_path_factory.mktemp("nvfp4")
    return {
        word: write_folder(source, NearestVariant(row, 16, attention=True), folder / word) for word, row in ROWS.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_names_dtypes_shapes_and_config_are_the_peers(ours: dict[str, Path]) -> None:
    mine, theirs = tensors_of(ours["compressed-tensors"]), tensors_of(PEER)
    assert {n: (t.dtype, t.shape) for n, t in mine.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    config, wanted = config_of(ours["compressed-tensors"]), config_of(PEER)
    assert set(wanted.pop("ignore")) <= set(config.pop("ignore"))
    for one in (config, wanted):
        del one["version"]
    assert config == wanted


@pytest.mark.parametrize("whose", ["ours", "peer"])
def test_read_as_compressed_tensors_reads(ours: dict[str, Path], whose: str) -> None:
    folder = ours["compressed-tensors"] if whose == "ours" else PEER
    read = open_source(folder)
    assert isinstance(read, QuantizedFolder)
    for name, tensor in dequantized(folder).items():  # in bfloat16, which holds our values as they are
        values = read.read(name)
        assert torch.equal(values if whose == "ours" else values.bfloat16().float(), tensor), name
    stack = read.read_experts(0, "down", range(1, 4), "cpu", torch.float32)
    assert torch.equal(stack[2], read.read("model.layers.0.block_sparse_moe.experts.3.w2.weight"))


def test_under_the_peers_scales_our_codes_are_the_peers() -> None:
    """The peer divides weights in bfloat16, which turns some of them: they are nearly halfway."""
    source, theirs = tensors_of(GOLDEN / "source-bf16"), tensors_of(PEER)
    for name in [n for n in theirs if n.endswith(".weight_packed")]:
        stem = name.removesuffix(".weight_packed")
        half = theirs[f"{stem}.weight_scale"].float() / theirs[f"{stem}.weight_global_scale"] / 2
        position = source[f"{stem}.weight"].float().unflatten(-1, (-1, 16)) / half.unsqueeze(-1)
        position = position.flatten(-2)
        codes, wanted = nearest(position), from_nibbles(theirs[name], position.shape[-1])
        turned = codes != wanted
        assert float(turned.float().mean()) < 0.02, name
        middle, at = ((codes + wanted) / 2)[turned], position[turned]
        assert bool(((at - middle).abs() <= 2**-7 * at.abs()).all()), name


def test_modelopt_holds_the_same_values(ours: dict[str, Path]) -> None:
    one, other = (tensors_of(ours[word]) for word in ROWS)
    for name in [n for n in one if n.endswith(".weight_packed")]:
        stem = name.removesuffix(".weight_packed")
        assert torch.equal(other[f"{stem}.weight"], one[name])
        assert torch.equal(other[f"{stem}.weight_scale"].float(), one[f"{stem}.weight_scale"].float())
        factor = other[f"{stem}.weight_scale_2"]
        assert factor.shape == ()
        assert float(factor) * float(one[f"{stem}.weight_global_scale"]) == 1
    config = config_of(ours["modelopt"])
    assert config["quant_algo"] == "W4A16_NVFP4"
    beside = json.loads((ours["modelopt"] / "hf_quant_config.json").read_text())
    assert set(beside["quantization"]) == {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}
    manifest = json.loads((ours["modelopt"] / "mmquant.fit.json").read_text())
    assert "hf_quant_config.json" in {f["path"] for f in manifest["artifacts"][0]["files"]}
    read, wanted = open_source(ours["modelopt"]), open_source(ours["compressed-tensors"])
    for layer_name in ("self_attn.k_proj", "block_sparse_moe.experts.2.w3"):
        name = f"model.layers.0.{layer_name}.weight"
        assert torch.equal(read.read(name), wanted.read(name))


@pytest.mark.parametrize("word", ROWS)
def test_what_engines_fuse_shares_its_factor(ours: dict[str, Path], word: str) -> None:
    tensors, suffix = (
        tensors_of(ours[word]),
        "weight_global_scale" if word == "compressed-tensors" else "weight_scale_2",
    )
    for first, second in FUSED:
        for name in [n for n in tensors if n.endswith(f"{first}.{suffix}")]:
            assert torch.equal(tensors[name], tensors[name.replace(first, second)]), name
    assert check_folder(ours[word], open_native(GOLDEN / "source-bf16")) == 4 + 3 * 4


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_matrices_of_different_size_share_it_too(row: Format) -> None:
    assert stacks(row, (("w1", "w3"), ("w2",))) == (("w1", "w3"), ("w2",))
    weights = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(2))
    tensors = stacked_tensors(Scheme(row, 4, 16), [["w1"], ["w3"]], [weights, 50 * weights[:, :8]])
    (factor,) = {name.partition(".")[2] for name in tensors if tensors[name].numel() == 1}
    assert torch.equal(tensors[f"w1.{factor}"], tensors[f"w3.{factor}"])
    for name, matrix in (("w1", weights[0]), ("w3", 50 * weights[0, :8])):
        found = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        values = row.unpack(Scheme(row, 4, 16), (len(matrix), 64), found.__getitem__)
        assert float((values - matrix).norm() / matrix.norm()) < 0.1


@pytest.mark.parametrize("word", ROWS)
def test_attention_is_left_out_where_it_is_not_quantized(tmp_path: Path, word: str) -> None:
    folder = write_folder(open_native(GOLDEN / "source-bf16"), NearestVariant(ROWS[word], 16), tmp_path / "out")
    found = open_source(folder)
    assert isinstance(found, QuantizedFolder)
    assert not found.warnings
    assert found.matrices["model.layers.0.self_attn.q_proj"].scheme is None
    assert found.matrices["model.layers.0.block_sparse_moe.experts.0.w1"].scheme == Scheme(ROWS[word], 4, 16)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_fp4_activations_are_said_and_found_again(row: Format) -> None:
    scheme = Scheme(row, 4, 16, activations=4)
    assert row.config is not None
    config = row.config(scheme, False, NAMES)
    for engine in ENGINES:
        single = row.method.single
        names = names_of(NAMES, "model.layers.0.block_sparse_moe.experts.3.w1", engine, single, row.method.fused)
        assert row.method.read((row,), config, names, engine) == scheme
        attention = names_of(NAMES, "model.layers.0.self_attn.q_proj", engine, single, row.method.fused)
        assert row.method.read((row,), config, attention, engine) is None
    if row is nvfp4.FORMAT:
        said = QuantizationConfig.model_validate(config).config_groups["NVFP4A4"].input_activations  # type: ignore[index]
        assert said is not None
        assert said.num_bits == 4
        assert said.group_size == 16
        assert said.dynamic == "local"
    assert row.input_scale is not None
    (values,) = row.input_scale(torch.tensor([2.0, 5376.0])).values()
    factors = values.flatten() if row is modelopt.FORMAT else 1 / values.flatten()
    assert factors.tolist() == pytest.approx([2 / 2688, 2.0])


EXCLUSIONS = {
    "exact": (["model.layers.0.self_attn.q_proj"], VLLM, True),
    "a part of the name": (["layers.0.self_attn"], VLLM, True),
    "a part of the name, SGLang": (["layers.0.self_attn"], SGLANG, False),
    "wildcard": (["model.layers.0.self_attn*"], SGLANG, True),
    "one part by wildcard": (["q_*"], SGLANG, True),
    "another layer": (["model.layers.10.self_attn*"], VLLM, False),
    "experts are no attention": (["*.block_sparse_moe.gate"], VLLM, False),
}


@pytest.mark.parametrize("case", EXCLUSIONS.values(), ids=EXCLUSIONS)
def test_modelopts_exclusions_as_each_engine_matches_them(case: tuple[list[str], str, bool]) -> None:
    entries, engine, excluded = case
    for key in ("ignore", "exclude_modules"):
        config: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "nvfp4", key: entries}
        if key == "exclude_modules":
            config = {"quant_method": "modelopt", "quantization": config}
        found = modelopt.FORMAT.method.read((modelopt.FORMAT,), config, ("model.layers.0.self_attn.q_proj",), engine)
        assert (found is None) == excluded


def test_weights_only_where_no_group_has_input_activations() -> None:
    config = {"quant_algo": "NVFP4", "ignore": [], "config_groups": {"a": {"input_activations": None}}}
    found = modelopt.FORMAT.method.read((modelopt.FORMAT,), config, ("x",), VLLM)
    assert found is not None
    assert found.activations == 16
    config["config_groups"] = {"a": {"input_activations": {"num_bits": 4}}}
    found = modelopt.FORMAT.method.read((modelopt.FORMAT,), config, ("x",), VLLM)
    assert found is not None
    assert found.activations == 4


def spoiled(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """The peer's folder with other tensors or another quantization_config."""
    shutil.copytree(PEER, folder)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        whole = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    ("suffix", "value", "words"),
    [
        ("weight_global_scale", 0.0, "k_proj.weight_global_scale is not positive"),
        ("weight_global_scale", float("inf"), "k_proj.weight_global_scale is not finite"),
        ("weight_scale", float("nan"), "k_proj.weight_scale is not finite"),
    ],
)
def test_scales_must_be_numbers(tmp_path: Path, suffix: str, value: float, words: str) -> None:
    tensors, name = tensors_of(PEER), "model.layers.0.self_attn.k_proj"
    scale = tensors[f"{name}.{suffix}"].clone()
    scale.flatten()[0] = value
    folder = spoiled(tmp_path / "bad", tensors | {f"{name}.{suffix}": scale})
    with pytest.raises(InputError, match=words):
        open_source(folder).read(name + ".weight")


def test_bad_config(tmp_path: Path) -> None:
    config = config_of(PEER)
    config["config_groups"]["NVFP4A16"]["weights"]["group_size"] = 32
    with pytest.raises(InputError, match="in groups of 32 in NVFP4A16, expected 16"):
        open_source(spoiled(tmp_path / "groups", tensors_of(PEER), config))
    with pytest.raises(InputError, match="quant_algo is 'FP8', expected NVFP4 or W4A16_NVFP4"):
        open_source(spoiled(tmp_path / "algo", tensors_of(PEER), {"quant_method": "modelopt", "quant_algo": "FP8"}))
    missing = {n: t for n, t in tensors_of(PEER).items() if not n.endswith("0.w1.weight_global_scale")}
    with pytest.raises(InputError, match="weight_global_scale is missing"):
        open_source(spoiled(tmp_path / "missing", missing))
