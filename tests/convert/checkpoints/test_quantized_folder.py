"""Quantized folders decode as compressed-tensors does, and as AWQ and GPTQ unpacked by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.ct_reader import copy_of, dequantized, tensors_of
from helpers.paths import GOLDEN
from mmquant.convert.checkpoints.quantization_config import SchemeBook
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.checkpoints.store import LocalFolder
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.open import open_source
from mmquant.quantize.integer.pack import pack_rows, pack_zeros_ct

CT = [
    "peer-llmc-mf-fp8-block",
    "peer-llmc-mf-fp8-dynamic",
    "peer-llmc-mf-w4a16-g128-sym",
    "peer-llmc-mf-w4a16-g128-asym",
    "loads-ct-mix-attnfp8-expw4",
]
W2 = "model.layers.0.block_sparse_moe.experts.3.w2"


def opened(folder: Path) -> QuantizedFolder:
    source = QuantizedFolder(LocalFolder(folder))
    source.validate()
    return source


@pytest.mark.parametrize("name", CT)
def test_compressed_tensors_values_are_its_own_decompressors(name: str) -> None:
    source = opened(GOLDEN / name)
    wanted = dequantized(GOLDEN / name)
    matrices = [n for n in wanted if n.endswith("_proj.weight") or ".experts." in n]
    assert len(matrices) == 4 + 4 * 3
    for weight in matrices:
        assert torch.equal(source.read(weight), wanted[weight]), weight


def test_experts_are_read_together_as_apart() -> None:
    source = opened(GOLDEN / CT[3])
    for projection, release in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        together = source.read_experts(0, projection, range(1, 4), "cpu", torch.float32)
        for position, expert in enumerate(range(1, 4)):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{release}.weight"
            assert torch.equal(together[position], source.read(name))
        half = source.read_experts(0, projection, range(4), "cpu", torch.bfloat16)
        assert torch.equal(half[1:], together.to(torch.bfloat16))


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """[..., 32 / bits] fields of int32 words, lowest bits first, by division."""
    unsigned = words.astype(np.int64) % 2**32
    return np.stack([unsigned // 2 ** (bits * i) % 2**bits for i in range(32 // bits)], -1)


def test_awq_values_by_hand() -> None:
    """AutoAWQ gemm: nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i]; weight = (q - zero) * scale."""
    stored = tensors_of(GOLDEN / "peer-autoround-awq-g128")
    source = opened(GOLDEN / "peer-autoround-awq-g128")
    for name, theirs in ((W2, W2[:-2] + "down_proj"), ("model.layers.0.self_attn.k_proj",) * 2):
        parts = {k: stored[f"{theirs}.{k}"].numpy() for k in ("qweight", "qzeros", "scales")}
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        codes, zeros = (np.empty((*parts[k].shape, 8), np.int64) for k in ("qweight", "qzeros"))
        codes[..., order], zeros[..., order] = fields(parts["qweight"], 4), fields(parts["qzeros"], 4)
        codes, zeros = codes.reshape(len(codes), -1), zeros.reshape(len(zeros), -1)
        group = np.arange(len(codes)) // 128
        wanted = (codes - zeros[group]) * parts["scales"].astype(np.float32)[group]
        np.testing.assert_array_equal(source.read(name + ".weight").numpy(), wanted.T)


def test_gptq_values_by_hand() -> None:
    """GPTQ v1, symmetric: inputs packed eight to a word down the rows; engines take 8 for the zero point."""
    stored = tensors_of(GOLDEN / "peer-autoround-gptq-g128")
    source = opened(GOLDEN / "peer-autoround-gptq-g128")
    theirs = W2[:-2] + "down_proj"
    packed = stored[f"{theirs}.qweight"].numpy()
    codes = fields(packed, 4).transpose(0, 2, 1).reshape(-1, packed.shape[1])
    scales = stored[f"{theirs}.scales"].float().numpy()
    wanted = (codes - 8) * scales[np.arange(len(codes)) // 128]
    np.testing.assert_array_equal(source.read(W2 + ".weight").numpy(), wanted.T)
    assert "gate/up/down_proj" in source.notes[0]


@pytest.mark.parametrize("name", ["peer-autoround-awq-g128", "peer-autoround-gptq-g128"])
def test_peers_int4_is_near_the_weights_it_was_made_of(name: str) -> None:
    source, truth = opened(GOLDEN / name), open_source(GOLDEN / "source-bf16")
    for weight in (W2 + ".weight", "model.layers.0.self_attn.o_proj.weight"):
        error = (source.read(weight) - truth.read(weight)).norm() / truth.read(weight).norm()
        assert 0.05 < error < 0.12


def test_gptq_with_zero_points_and_order_of_columns(tmp_path: Path) -> None:
    """Asymmetric with g_idx, both ways of storing zero points, 8 bits: against the definition."""
    name = "model.layers.0.self_attn.k_proj"
    generator = torch.Generator().manual_seed(0)
    codes, zeros = (torch.randint(0, 256, s, generator=generator) for s in ((256, 128), (2, 128)))
    scales, groups = torch.rand(2, 128, generator=generator), torch.randint(0, 2, (256,), generator=generator)
    for version, offset in (("gptq", 1), ("gptq_v2", 0)):

        def change(
            config: dict[str, Any], tensors: dict[str, torch.Tensor], version: str = version, offset: int = offset
        ) -> None:
            rules = {r"+:.*k_proj": {"bits": 8, "sym": False, "desc_act": True}}
            config["quantization_config"] |= {"checkpoint_format": version, "dynamic": rules}
            shifts = 256 ** torch.arange(4)
            words = (codes.view(64, 4, 128) * shifts[None, :, None]).sum(1)
            stored = ((zeros - offset) % 256).view(2, 32, 4)
            tensors[name + ".qweight"] = words.to(torch.int64).to(torch.int32)
            tensors[name + ".qzeros"] = (stored * shifts).sum(-1).to(torch.int32)
            tensors[name + ".scales"], tensors[name + ".g_idx"] = scales.half(), groups.to(torch.int32)

        source = opened(copy_of("peer-autoround-gptq-g128", tmp_path / version, change))
        wanted = (codes - zeros[groups]).float() * scales.half().float()[groups]
        torch.testing.assert_close(source.read(name + ".weight"), wanted.T, rtol=1e-6, atol=0)


def test_ragged_groups_and_zero_points(tmp_path: Path) -> None:
    """256 inputs in groups of 96: the last group is short."""
    name = "model.layers.0.self_attn.k_proj"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (128, 256), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (128, 3), generator=generator, dtype=torch.int8)
    scales = torch.rand(128, 3, generator=generator)

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        groups = config["quantization_config"]["config_groups"]
        weights = next(iter(groups.values()))["weights"] | {"group_size": 96}
        groups["ragged"] = {"targets": ["re:.*k_proj$"], "weights": weights, "format": "pack-quantized"}
        tensors |= {name + ".weight_packed": pack_rows(codes, 4), name + ".weight_scale": scales}
        tensors[name + ".weight_zero_point"] = pack_zeros_ct(zeros, 4)

    source = opened(copy_of("peer-llmc-mf-w4a16-g128-asym", tmp_path / "ragged", change))
    group = torch.arange(256) // 96
    wanted = (codes.float() - zeros.float()[:, group]) * scales[:, group]
    assert torch.equal(source.read(name + ".weight"), wanted)


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def ct_config(*groups: tuple[list[str], dict[str, Any]], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    named = {
        f"g{i}": {"targets": t, "weights": WEIGHTS | w, "format": "pack-quantized"} for i, (t, w) in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore)}


def bits_of(config: dict[str, Any], name: str, engine: str = "vLLM") -> int | None:
    scheme = SchemeBook(config, NAMES).reading(name, engine)
    return None if scheme is None else scheme.bits


def test_groups_are_matched_as_engines_match_them() -> None:
    expert, other = "model.layers.1.block_sparse_moe.experts.7.w2", "model.layers.2.block_sparse_moe.experts.7.w2"
    by_class = ct_config((["Linear"], {}), (["re:.*layers\\.1\\..*experts\\..*"], {"num_bits": 8}))
    assert (bits_of(by_class, expert), bits_of(by_class, other)) == (8, 4), "a name wins over the class before it"
    first = ct_config((["re:.*experts.*"], {"num_bits": 8}), (["re:.*layers\\.1\\..*"], {}))
    assert bits_of(first, expert) == 8, "the first pattern wins"
    classes = ct_config((["Linear"], {}), (["Linear"], {"num_bits": 8}))
    assert bits_of(classes, expert) == 4, "so does the first class"
    vllm, sglang = "re:model\\.layers\\.1\\.mlp\\.experts\\..*", "re:.*block_sparse_moe.experts.0.down_proj"
    for pattern, engine, other_engine in ((vllm, "vLLM", "SGLang"), (sglang, "SGLang", "vLLM")):
        config = ct_config(([pattern], {}))
        assert (bits_of(config, expert, engine), bits_of(config, expert, other_engine)) == (4, None), engine
    assert bits_of(ct_config((["re:layers\\.1"], {})), expert) is None, "a pattern matches from the start"
    assert bits_of(ct_config((["Linear"], {}), ignore=("re:.*layers\\.1\\..*",)), expert) is None
    assert bits_of(ct_config((["Linear"], {}), ignore=(other,)), other, "transformers") is None
    assert bits_of(ct_config((["Linear"], {}), ignore=(other,)), other) == 4, "vLLM knows it by another name"


def test_gptq_rules_are_matched_as_vllm_matches_them() -> None:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    name = "model.layers.0.block_sparse_moe.experts.3.w1"
    assert bits_of(base | {"dynamic": {"+:.*\\.layers\\.0\\..*experts.*": {"bits": 8}}}, name) == 8
    assert bits_of(base | {"dynamic": {"-:.*mlp\\.experts$": {}, ".*": {"bits": 8}}}, name) is None
    assert bits_of(base | {"dynamic": {"layers": {"bits": 8}}}, name) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
        ({"config_groups": {}}, "config_groups is missing or empty"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head', expected a list"),
        ({"ignore": ["re:("]}, "is not a regular expression"),
        ({"ignore": ["re:a{99999999999}"]}, "is not a regular expression (the repetition number is too large)"),
        ({"ignore": ["re:" + "(" * 1999 + ")" * 1999]}, "is not a regular expression"),
        ({"ignore": ["re:" + "(" * 9999 + ")" * 9999]}, "19,998 characters, expected at most 4,000"),
    ],
)
def test_configs_that_are_not_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SchemeBook(ct_config((["Linear"], {})) | change, NAMES).reading(W2, "vLLM")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 9}, "pack-quantized of 9 bits"),
        ({"num_bits": True}, "pack-quantized of True bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"strategy": "token"}, "strategy 'token'"),
        ({"strategy": "block", "block_structure": [128]}, "block_structure in g0 is [128]"),
    ],
)
def test_schemes_that_are_not_read(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SchemeBook(ct_config((["Linear"], weights)), NAMES).reading(W2, "vLLM")


def drop(*names: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return change


def bad_scale(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[W2 + ".weight_scale"][0, 0] = float("nan")


def bad_shape(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[W2 + ".weight_packed"] = tensors[W2 + ".weight_packed"][:, :-1]


def wrong_bits(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    next(iter(config["quantization_config"]["config_groups"].values()))["weights"]["num_bits"] = 8


def ignored(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["quantization_config"]["ignore"].append("re:.*experts.*")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(W2 + ".weight_packed"), "w2.weight_packed is missing"),
        (drop("model.norm.weight"), "1 tensors are missing, first model.norm.weight"),
        (bad_scale, "weight_scale is not finite"),
        (bad_shape, "expected [256, 32]"),
        (wrong_bits, "expected [256, 64]"),
        (ignored, "quantization_config in config.json leaves it unquantized"),
        (lambda config, tensors: config.update(num_hidden_layers=10**9), "calls for 16000000000 matrices"),
    ],
)
def test_folders_that_contradict_themselves(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], message: str
) -> None:
    folder = copy_of("peer-llmc-mf-w4a16-g128-sym", tmp_path / "bad", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(folder).read(W2 + ".weight")


def test_fingerprints_tell_variants_apart() -> None:
    found = {opened(GOLDEN / name).fingerprint for name in CT}
    assert len(found) == len(CT)
