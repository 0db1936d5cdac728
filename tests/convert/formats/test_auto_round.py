"""AutoRound's own folders: what it wrote is read bit by bit, and its settings are taken as it takes them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.ct_reader import copy_of, tensors_of
from helpers.paths import GOLDEN
from mmquant.convert.checkpoints.quantization_config import SchemeBook
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.formats import auto_round
from mmquant.convert.formats.format import Scheme
from mmquant.convert.formats.skip_lists import AUTO_ROUND
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.open import open_source
from mmquant.errors import InputError

MIXED = "peer-autoround-mixed"
EXPERT, THEIRS = "model.layers.0.block_sparse_moe.experts.3.w2", "model.layers.0.mlp.experts.3.down_proj"
K_PROJ, O_PROJ = "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj"


def opened(folder: Path) -> QuantizedFolder:
    source = open_source(folder)
    assert isinstance(source, QuantizedFolder)
    source.validate()
    return source


def stream(words: Tensor, bits: int, count: int) -> np.ndarray:
    """[rows, count] fields of rows of words, taken as one stream of bits, the lowest first."""
    raw = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    return raw[:, : count * bits].reshape(len(raw), count, bits) @ (1 << np.arange(bits))


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [
        (K_PROJ, 8, 256),
        ("model.layers.0.self_attn.q_proj", 4, 32),
        ("model.layers.0.self_attn.v_proj", 3, 64),
        ("model.layers.0.block_sparse_moe.experts.1.w1", 2, 32),
        (EXPERT, 3, 64),
    ],
)
def test_values_by_hand(name: str, bits: int, group: int) -> None:
    """packing_format auto_round: inputs are a stream of bits down the rows, zero points one along outputs."""
    stored, source = tensors_of(GOLDEN / MIXED), opened(GOLDEN / MIXED)
    theirs = re.sub(r"w\d$", {"w1": "gate_proj", "w2": "down_proj"}.get(name[-2:], ""), name)
    packed, zeros, scales = (stored[f"{theirs}.{part}"] for part in ("qweight", "qzeros", "scales"))
    codes = stream(packed.T, bits, len(packed) * 32 // bits)
    offsets = stream(zeros, bits, scales.shape[1]).T
    at = np.arange(codes.shape[1]) // group
    wanted = (codes - offsets[:, at]).astype(np.float32) * scales.float().numpy().T[:, at]
    np.testing.assert_array_equal(source.read(name + ".weight").numpy(), wanted)
    truth = open_source(GOLDEN / "source-bf16").read(name + ".weight")
    error = float((source.read(name + ".weight") - truth).norm() / truth.norm())
    assert error < {8: 0.01, 4: 0.12, 3: 0.22, 2: 0.45}[bits]


def test_what_is_left_alone_and_what_experts_share() -> None:
    source = opened(GOLDEN / MIXED)
    assert source.scheme(O_PROJ) is None
    assert torch.equal(source.read("lm_head.weight"), tensors_of(GOLDEN / MIXED)["lm_head.weight"].float())
    for projection, release in (("gate", "w1"), ("down", "w2"), ("up", "w3")):  # expert 1 has other bits
        together = source.read_experts(0, projection, range(4), "cpu", torch.float32)
        for expert in range(4):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{release}.weight"
            assert torch.equal(together[expert], source.read(name))


BASE: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}
ZEROS = {"packing_format": "auto_round", "sym": False}
HALF = {"bits": 16}


def scheme(changes: dict[str, Any], name: str = EXPERT) -> Scheme | None:
    return SchemeBook(BASE | changes, NAMES).reading(name, AUTO_ROUND)


@pytest.mark.parametrize("name", [EXPERT, THEIRS, THEIRS.replace("mlp", "block_sparse_moe"), ".*experts\\.3\\..*"])
def test_a_module_is_found_by_each_of_its_names(name: str) -> None:
    found = scheme({"extra_config": {name: {"bits": 8, "group_size": -1, "sym": None}}})
    assert found is not None
    assert (found.bits, found.group, found.symmetric) == (8, -1, True)


@pytest.mark.parametrize(
    ("changes", "name", "bits"),
    [
        ({}, EXPERT, 4),
        ({"quant_method": "intel/auto-round"}, K_PROJ, 4),
        ({}, "lm_head", None),
        ({"extra_config": {"lm_head": {"bits": 8}}}, "lm_head", 8),
        ({"extra_config": {".*head.*": {"bits": 8}}}, "lm_head", None),
        ({"extra_config": {".*3\\..*": HALF, EXPERT: {"bits": 2}}}, EXPERT, 2),  # the name wins
        ({"extra_config": {"experts": {"bits": 3}, "w2": HALF}}, EXPERT, 3),  # the first pattern wins
        ({"extra_config": {"(": HALF, ".*": {}, "3": {"bits": 3}}}, EXPERT, 3),  # what is no pattern, and nothing
        ({"extra_config": {"a{99999999999}": HALF, "(" * 1999 + ")" * 1999: HALF, "3": {"bits": 3}}}, EXPERT, 3),
        ({"extra_config": {"model.layers.0.block": HALF}}, EXPERT, 4),  # a name, and no pattern
        ({"block_name_to_quantize": "model.layers"}, K_PROJ, 4),
        ({"block_name_to_quantize": "model.layers.1, model.layers.2"}, K_PROJ, None),
        ({"block_name_to_quantize": ["model.layers.1", "model.layers.0"]}, K_PROJ, 4),
        ({"to_quant_block_names": [["model.layers.1"]]}, K_PROJ, None),
        ({"to_quant_block_names": [["model.layers.1"]], "extra_config": {K_PROJ: {"bits": 8}}}, K_PROJ, 8),
    ],
)
def test_settings_of_a_module(changes: dict[str, Any], name: str, bits: int | None) -> None:
    found = scheme(changes, name)
    assert (None if found is None else found.bits) == bits


def test_names_are_told_from_patterns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a module: with half of M2.7's 47,616 experts' matrices named, opening took minutes."""
    asked, pattern = list[str](), auto_round.NAME

    def fullmatch(key: str) -> re.Match[str] | None:
        asked.append(key)
        return pattern.fullmatch(key)

    monkeypatch.setattr(auto_round, "NAME", SimpleNamespace(fullmatch=fullmatch))
    matrices = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1" for expert in range(100)]
    extra = {name: {"bits": 8} for name in matrices[::2]} | {r"\.9\d\.": {"bits": 2}}
    for _ in range(2):  # another folder's in between
        asked.clear()
        book = SchemeBook(BASE | {"extra_config": dict(extra)}, NAMES)
        bits = [found.bits for name in matrices if (found := book.reading(name, AUTO_ROUND)) is not None]
        assert bits == [8 if place % 2 == 0 else 2 if place > 90 else 4 for place in range(100)]
        assert sorted(asked) == sorted(extra)


@pytest.mark.parametrize(
    ("changes", "kind", "plus_one", "size"),
    [
        ({"sym": False}, "gptq", True, 128),
        ({"sym": False, "packing_format": "auto_round:gptq:exllamav2"}, "gptq", True, 128),
        (ZEROS, "gptq", False, 128),
        (ZEROS | {"packing_format": "auto_round:gptqmodel"}, "gptq", False, 128),
        ({"packing_format": "auto_round:auto_awq", "group_size": -1}, "awq", True, -1),
        ({"data_type": "mx_fp", "group_size": 32, "packing_format": "auto_round:llm_compressor"}, "mx_fp4", True, 32),
        ({"data_type": "mx_fp_rceil", "group_size": 32, "bits": 8}, "mx_fp8", True, 32),
        ({"data_type": "nv_fp4_with_static_gs", "group_size": 16}, "nv_fp", True, 16),
        ({"data_type": "fp", "bits": 8, "group_size": 0}, "fp", True, -1),
        ({"data_type": "fp8_e4m3", "bits": 8, "group_size": -1}, "fp", True, -1),
    ],
)
def test_how_a_module_is_stored(changes: dict[str, Any], kind: str, plus_one: bool, size: int) -> None:
    found = scheme(changes)
    assert found is not None
    assert (found.format.kind, found.zeros_plus_one, found.group) == (kind, plus_one, size)


def test_fp8_in_tiles() -> None:
    found = scheme({"data_type": "fp", "bits": 8, "group_size": [128, 64], "packing_format": "auto_round:fp8"})
    assert found is not None
    assert found.block == (128, 64)


def respelled(name: str, target: Path, settings: dict[str, Any]) -> QuantizedFolder:
    """A golden folder with AutoRound's words for its settings; router and head are left alone."""

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors
        config["quantization_config"] = BASE | {"extra_config": {".*gate$": HALF}} | settings

    return opened(copy_of(name, target, change))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("peer-autoround-gptq-g128", {"packing_format": "auto_round:auto_gptq"}),
        ("peer-autoround-awq-g128", {"packing_format": "auto_round:auto_awq", "sym": False}),
        ("peer-llmc-mf-mxfp4a16", {"data_type": "mx_fp", "group_size": 32}),
        ("peer-llmc-mf-nvfp4a16", {"data_type": "nv_fp", "group_size": 16}),
        ("peer-llmc-mf-fp8-dynamic", {"data_type": "fp", "bits": 8, "group_size": -1}),
        ("loads-native-fp8-block", {"data_type": "fp", "bits": 8, "group_size": [128, 128]}),
    ],
)
def test_its_words_for_other_formats_say_the_same(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    known, found = open_source(GOLDEN / name), respelled(name, tmp_path / "folder", settings)
    for module in found.matrices:
        assert torch.equal(found.dequantize(module), known.read(module + ".weight")), module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "AutoRound's 'int' of 9 bits, expected int of 2 to 8 bits"),
        ({"bits": "4"}, "AutoRound's 'int' of '4' bits"),
        ({"bits": True}, "of True bits"),
        ({"data_type": "mx_int", "bits": 4}, "AutoRound's 'mx_int' of 4 bits"),
        ({"data_type": "nv_fp", "packing_format": "auto_round:llm_compressor_nvfp4_e5m3"}, "'nv_fp' of 4 bits"),
        ({"data_type": "mx_fp", "group_size": 64}, "group_size 64"),
        ({"data_type": "fp", "bits": 8, "group_size": 64}, "FP8 in groups of 64"),
        ({"data_type": "fp", "bits": 8, "group_size": [0, 1]}, "group_size is [0, 1], expected two positive integers"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 10**400}, "group_size 1000"),
        ({"data_type": "fp", "bits": 8, "group_size": [10**400, 1]}, "expected two positive integers"),
        ({"packing_format": 4}, "packing_format is 4"),
        ({"extra_config": [1]}, "extra_config is a list"),
        ({"extra_config": {EXPERT: 16}}, "is 16, expected an object"),
        ({"block_name_to_quantize": {"a": 1}}, "block_name_to_quantize is {'a': 1}"),
        ({"block_name_to_quantize": [[[[[]]]]]}, "expected names of blocks"),
    ],
)
def test_settings_that_are_not_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        scheme(changes)
