"""compressed-tensors in all widths: what its own compressors pack is read bit by bit, over awkward shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ct_reader import copy_of, dequantized
from helpers.paths import GOLDEN
from helpers.widths import mixed, random_state, settings, theirs
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.checkpoints.parts import as_stored, fits
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.checkpoints.store import TensorInfo
from mmquant.convert.folder.writer import DTYPE_NAMES
from mmquant.convert.formats import compressed_tensors as ct
from mmquant.convert.formats.format import Fetch, PartError, Scheme
from mmquant.convert.formats.scales import scaled
from mmquant.convert.formats.table import formats_of
from mmquant.convert.open import open_source
from mmquant.errors import InputError
from mmquant.quantize.integer.pack import unpack_rows, words_of

# (outputs, inputs, group): one row, one column, no multiple of 32 or of a word anywhere. compressed-tensors 0.20 itself
# cannot unpack 4-bit zero points of groups where the outputs fill one word.
SHAPES = [(13, 70, 10), (33, 96, 32), (1, 1, 1), (7, 31, 31), (64, 40, 8), (11, 129, 43)]
BITS = range(1, 9)


def scheme_of(kind: str, weights: dict[str, Any]) -> Scheme:
    """The scheme that config.json's words stand for."""
    group = {"targets": ["Linear"], "weights": weights, "format": kind}
    found = ct.METHOD.read(formats_of(ct.METHOD), {"config_groups": {"g": group}}, ("m",), "vLLM")
    assert found is not None
    return found


def check_same(kind: str, weights: dict[str, Any], shape: tuple[int, int]) -> None:
    """One matrix, and a stack of three; the planned parts are those that were stored."""
    scheme = scheme_of(kind, weights)
    each = [theirs(kind, weights, random_state(shape, weights, seed)) for seed in range(3)]
    stored, values = each[0]
    info = {suffix: TensorInfo("m", "s", DTYPE_NAMES[t.dtype], tuple(t.shape), 0, 0) for suffix, t in stored.items()}
    assert fits(scheme, shape, info)
    assert {part.suffix for part in scheme.format.parts(scheme, shape)} == set(stored)
    assert torch.equal(scheme.format.unpack(scheme, shape, stored.__getitem__), values)
    fetch: Fetch = lambda suffix: torch.stack([one[suffix] for one, _ in each])  # noqa: E731
    assert torch.equal(scheme.format.unpack(scheme, shape, fetch), torch.stack([v for _, v in each]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("bits", BITS)
def test_packed_integers(bits: int, strategy: str, symmetric: bool) -> None:
    for outputs, inputs, group in SHAPES:
        check_same("pack-quantized", settings(bits, strategy, symmetric, group), (outputs, inputs))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor", "block"])
@pytest.mark.parametrize(("kind", "bits"), [("int-quantized", 8), ("int-quantized", 4), ("naive-quantized", 3)])
def test_a_byte_for_each_code(kind: str, bits: int, strategy: str, symmetric: bool) -> None:
    for outputs, inputs, group in SHAPES:
        more = {"block_structure": [4, 16]} if strategy == "block" else {}
        check_same(kind, settings(bits, strategy, symmetric, group) | more, (outputs, inputs))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("kind", ["float-quantized", "naive-quantized"])
def test_fp8(kind: str, strategy: str, symmetric: bool) -> None:
    for outputs, inputs, group in SHAPES:
        check_same(kind, settings(8, strategy, symmetric, group, "float"), (outputs, inputs))


@pytest.mark.parametrize(("kind", "bits"), [("mxfp8-quantized", 8), ("mxfp6-pack-quantized", 6)])
@pytest.mark.parametrize("shape", [(3, 32), (1, 96), (65, 128)])
def test_powers_of_two(kind: str, bits: int, shape: tuple[int, int]) -> None:
    """In bfloat16, in which their reader unpacks MXFP6; every value is exact in it."""
    weights = settings(bits, "group", True, 32, "float") | {"scale_dtype": "torch.uint8"}
    state = random_state(shape, weights)
    state["weight_scale"] = torch.exp2(torch.randint(-9, 9, state["weight_scale"].shape).float())
    stored, values = theirs(kind, weights, {name: part.bfloat16() for name, part in state.items()})
    scheme = scheme_of(kind, weights)
    assert torch.equal(scheme.format.unpack(scheme, shape, stored.__getitem__), values)
    assert float(values.abs().max()) > 0


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_whole_codes(bits: int) -> None:
    """Until compressed-tensors 0.18 a word held 32 // bits whole codes; the shape tells the two apart."""
    rows, inputs, per_word = 4, 200, 32 // bits
    codes = torch.randint(0, 1 << bits, (rows, inputs), generator=torch.Generator().manual_seed(0))
    words = [
        [
            sum(int(code) << (bits * place) for place, code in enumerate(row[start : start + per_word]))
            for start in range(0, inputs, per_word)
        ]
        for row in codes
    ]
    packed = torch.tensor(words).to(torch.int64).to(torch.int32)
    assert packed.shape[1] == words_of(inputs, bits, dense=False) > words_of(inputs, bits)
    assert torch.equal(unpack_rows(packed, bits, inputs, dense=False), (codes - (1 << (bits - 1))).to(torch.int8))
    scheme = scheme_of("pack-quantized", settings(bits, "channel", True, 0))
    info = {"weight_packed": packed.shape, "weight_scale": (rows, 1)}
    parts = {suffix: TensorInfo("m", "s", "I32", tuple(shape), 0, 0) for suffix, shape in info.items()}
    assert not as_stored(scheme, (rows, inputs), parts).dense
    parts["weight_packed"] = TensorInfo("m", "s", "I32", (rows, words_of(inputs, bits)), 0, 0)
    assert as_stored(scheme, (rows, inputs), parts).dense


@pytest.mark.parametrize("kind", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_in_the_groups_that_an_index_names(kind: str, symmetric: bool) -> None:
    """actorder "group", which compressed-tensors wrote until 0.18: by the definition, element by element."""
    shape, group = (12, 20), 5
    said = settings(4, "group", symmetric, group)
    stored, _ = theirs(kind, said, random_state(shape, said))
    stored["weight_g_idx"] = torch.randperm(20, generator=torch.Generator().manual_seed(1)) // group
    ordered = scheme_of(kind, said | {"actorder": "group"})
    assert ordered.act_order
    values = ordered.format.unpack(ordered, shape, stored.__getitem__)
    codes = _unit(kind, said, stored, shape)
    zeros = _zeros(kind, said, stored, shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            at = int(stored["weight_g_idx"][column])
            wanted = (codes[row, column] - zeros[row, at]) * stored["weight_scale"][row, at]
            assert values[row, column] == wanted
    stored["weight_g_idx"] = torch.full((20,), -1)  # no order was found
    plain = scheme_of(kind, said)
    wanted = plain.format.unpack(plain, shape, stored.__getitem__)
    assert torch.equal(ordered.format.unpack(ordered, shape, stored.__getitem__), wanted)
    stored["weight_g_idx"][3] = 4
    with pytest.raises(PartError, match="weight_g_idx names groups beyond 4"):
        ordered.format.unpack(ordered, shape, (stored | {"weight_g_idx": stored["weight_g_idx"].abs()}).__getitem__)


def _unit(kind: str, said: dict[str, Any], stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Codes: the values under scales of one and without zero points."""
    plain = scheme_of(kind, said | {"symmetric": True})
    ones = stored | {"weight_scale": torch.ones_like(stored["weight_scale"])}
    return plain.format.unpack(plain, shape, ones.__getitem__)


def _zeros(kind: str, said: dict[str, Any], stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Zero points of groups: what a code loses under scales of one."""
    both = scheme_of(kind, said)
    ones = stored | {"weight_scale": torch.ones_like(stored["weight_scale"])}
    moved = both.format.unpack(both, shape, ones.__getitem__)
    return (_unit(kind, said, stored, shape) - moved)[:, :: said["group_size"]]


@pytest.mark.parametrize(("size", "strategy"), [(None, "tensor"), (-1, "channel"), (32, "group")])
def test_a_strategy_that_is_not_said(size: int | None, strategy: str) -> None:
    said = {"num_bits": 8, "type": "int", "group_size": size}
    found = scheme_of("int-quantized", said)
    assert (found.whole, found.group) == (strategy == "tensor", 32 if strategy == "group" else -1)


def test_a_group_of_activations_alone_leaves_weights() -> None:
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": None}}, "format": "pack-quantized"}
    assert ct.METHOD.read(formats_of(ct.METHOD), config, ("m",), "vLLM") is None


def test_a_folder_of_many_widths(tmp_path: Path) -> None:
    folder = copy_of("source-bf16", tmp_path / "mixed", mixed)
    source = open_source(folder)
    assert isinstance(source, QuantizedFolder)
    source.validate()
    wanted = dequantized(folder)
    for name in source.matrices:
        assert torch.equal(source.dequantize(name), wanted[name + ".weight"]), name
    for projection, last in (("gate", "w1"), ("down", "w2"), ("up", "w3")):  # w2: one scale a matrix; expert 3 differs
        for experts in (range(3), range(4)):
            together = source.read_experts(0, projection, experts, "cpu", torch.float32)
            names = [f"model.layers.0.block_sparse_moe.experts.{e}.{last}.weight" for e in experts]
            assert torch.equal(together, torch.stack([wanted[name] for name in names]))


def test_fp8_that_no_source_can_be_is_read_all_the_same(tmp_path: Path) -> None:
    """FP8 in groups or with zero points: quantized weights to score, and none to quantize again."""

    def grouped(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        said = settings(8, "group", True, 64, "float")
        config["quantization_config"]["config_groups"]["FP8_DYNAMIC"]["weights"] |= said
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].expand(-1, tensors[name.removesuffix("_scale")].shape[1] // 64)

    folder = copy_of("peer-llmc-mf-fp8-dynamic", tmp_path / "grouped", grouped)
    source = open_source(folder)
    assert isinstance(source, QuantizedFolder)
    source.validate()
    known = open_source(GOLDEN / "peer-llmc-mf-fp8-dynamic")
    assert isinstance(known, Checkpoint)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(source.read(name), known.read(name))


def test_a_head_that_is_quantized_too(tmp_path: Path) -> None:
    def head(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["quantization_config"]["ignore"].remove("lm_head")
        weights = config["quantization_config"]["config_groups"]["W4A16"]["weights"]
        state = random_state((128, 256), weights)
        stored, _ = theirs("pack-quantized", weights, state)
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{suffix}": part for suffix, part in stored.items()}

    folder = copy_of("peer-llmc-mf-w4a16-g128-sym", tmp_path / "head", head)
    source = open_source(folder)
    source.validate()
    assert torch.equal(source.read("lm_head.weight"), dequantized(folder)["lm_head.weight"])


def without_zeros(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(iter(config["quantization_config"]["config_groups"].values()))["weights"]["symmetric"] = False


def wrong_dtype(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config
    for name in [n for n in tensors if n.endswith("weight_scale")]:
        tensors[name] = torch.ones(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("peer-llmc-mf-w4a16-g128-sym", without_zeros, "weight_zero_point is missing"),
        (
            "peer-llmc-mf-mxfp4a16",
            without_zeros,
            "mxfp4-pack-quantized with zero points in MXFP4A16, expected symmetric",
        ),
        ("peer-llmc-mf-w4a16-g128-sym", wrong_dtype, "weight_scale has shape"),
        ("peer-llmc-mf-fp8-dynamic", wrong_dtype, "weight_scale has dtype I32"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = copy_of(name, tmp_path / "bad", change)
    with pytest.raises(InputError, match=message):
        open_source(folder).validate()


def test_a_group_larger_than_the_row_takes_no_memory() -> None:
    codes = torch.randint(-8, 8, (3, 5), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales, zeros = torch.tensor([[0.5], [2.0], [3.0]]), torch.tensor([[1], [0], [-2]])
    assert torch.equal(scaled(codes, scales, zeros, 1 << 40), (codes - zeros) * scales)
