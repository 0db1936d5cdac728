"""Our FP8 and INT4 folders equal those of other tools from the same weights, tensor by tensor.

Two differences are on purpose. From a native FP8 release our block scales keep the release's float32 (its values must
come back bit by bit); from BF16 they are bfloat16 as the peer's. Our FP8 scales are the largest magnitude / 448 rounded
up to bfloat16, the peer's are rounded to nearest, which can push the largest weight of a block beyond 448; and the peer
divides in bfloat16, which rounds 3 % of the quotients onto a neighbour's side before they become e4m3.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.ct_reader import dequantized, tensors_of
from helpers.paths import GOLDEN
from mmquant.convert.folder.fp8 import Fp8Variant
from mmquant.convert.folder.variant import FolderVariant
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.open import open_native, open_source
from mmquant.quantize.integer.grid import IntWeight, dequantize
from mmquant.quantize.integer.pack import unpack_awq, unpack_gptq, unpack_gptq_zeros
from mmquant.runs.folder import write_folder

BLOCK, CHANNEL, INT4 = "peer-llmc-mf-fp8-block", "peer-llmc-mf-fp8-dynamic", "peer-llmc-mf-w4a16-g128-sym"
PAIRS: dict[str, FolderVariant] = {
    BLOCK: Fp8Variant("block"),
    CHANNEL: Fp8Variant("channel"),
    INT4: WeightsVariant(128, "int4"),
}
PEER_FOLDERS = [*PAIRS, "peer-llmc-mf-w4a16-g128-asym", "loads-ct-mix-attnfp8-expw4"]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our folder of each peer's scheme, from the same BF16 weights; `native` is FP8 block from native FP8."""
    folder = tmp_path_factory.mktemp("golden")
    bf16, fp8 = open_native(GOLDEN / "source-bf16"), open_native(GOLDEN / "loads-native-fp8-block")
    written = {peer: write_folder(bf16, variant, folder / peer) for peer, variant in PAIRS.items()}
    written["native"] = write_folder(fp8, Fp8Variant("block"), folder / "native")
    written["mixed"] = write_folder(bf16, WeightsVariant(128, "fp8"), folder / "mixed")
    return written


@pytest.fixture(scope="module")
def source() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors_of(GOLDEN / "source-bf16").items()}


def layout(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_of(folder).items()}


def matrices(source: dict[str, Tensor]) -> list[str]:
    return [n for n in source if ".experts." in n or n.endswith("_proj.weight")]


@pytest.mark.parametrize("peer", PAIRS)
def test_names_dtypes_and_shapes_are_the_peers(ours: dict[str, Path], peer: str) -> None:
    assert layout(ours[peer]) == layout(GOLDEN / peer)


@pytest.mark.parametrize("peer", PAIRS)
def test_config_is_the_peers(ours: dict[str, Path], peer: str) -> None:
    """All keys and values but three: more ignored names, an older reader version, RoPE spelled out."""
    mine = json.loads((ours[peer] / "config.json").read_text())
    theirs = json.loads((GOLDEN / peer / "config.json").read_text())
    assert mine.pop("rope_parameters")["partial_rotary_factor"] == theirs["rotary_dim"] / theirs["head_dim"]
    ignored = mine["quantization_config"].pop("ignore")
    assert set(theirs["quantization_config"].pop("ignore")) <= set(ignored)
    for config in (mine, theirs):
        del config["quantization_config"]["version"]
    assert mine == theirs


def test_mixed_layout_has_the_experts_of_the_loadable_sample(ours: dict[str, Path]) -> None:
    """FP8 attention beside INT4 experts: the same expert tensors as the folder that vLLM was seen to load."""
    mine, sample = layout(ours["mixed"]), layout(GOLDEN / "loads-ct-mix-attnfp8-expw4")
    assert set(mine) == set(sample)
    different = [name for name in mine if mine[name] != sample[name]]
    assert all(".self_attn." in name and name.endswith("weight_scale") for name in different)  # tiles, not channels


@pytest.mark.parametrize("peer", [BLOCK, CHANNEL])
def test_fp8_scales_are_the_smallest_that_hold_every_weight(
    ours: dict[str, Path], source: dict[str, Tensor], peer: str
) -> None:
    mine, theirs = tensors_of(ours[peer]), tensors_of(GOLDEN / peer)
    for name in matrices(source):
        weight, scale = source[name], mine[name.replace(".weight", ".weight_scale")].float()
        rows, cols = (128, 128) if peer == BLOCK else (1, weight.shape[1])
        peak = weight.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).abs().amax((1, 3))
        below = (scale.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float()
        assert bool((scale >= peak / 448).all()), name
        assert bool((below < peak / 448).all()), name
        near = theirs[name.replace(".weight", ".weight_scale")].float()
        assert bool(((scale == near) | (below == near)).all()), name  # rounding to nearest is one step below at most


@pytest.mark.parametrize("peer", [BLOCK, CHANNEL])
def test_fp8_codes_are_the_peers_under_the_same_scale(
    ours: dict[str, Path], source: dict[str, Tensor], peer: str
) -> None:
    """Where both round the scale alike, the codes are the peer's but for its division in bfloat16."""
    mine, theirs = tensors_of(ours[peer]), tensors_of(GOLDEN / peer)
    compared = 0
    for name in matrices(source):
        key = name.replace(".weight", ".weight_scale")
        rows, cols = (128, 128) if peer == BLOCK else (1, source[name].shape[1])
        scale = theirs[key].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        same = (mine[key] == theirs[key]).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        twice_rounded = (source[name].bfloat16() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(theirs[name].view(torch.uint8), twice_rounded.view(torch.uint8)), name
        once_rounded = (source[name] / scale.float()).to(torch.float8_e4m3fn)
        assert torch.equal(mine[name].view(torch.uint8)[same], once_rounded.view(torch.uint8)[same]), name
        compared += int(same.sum())
    assert compared > 500_000


def test_int4_costs_less_than_the_peers(ours: dict[str, Path], source: dict[str, Tensor]) -> None:
    """The peer takes absmax; ours searches: less squared error in all, and no group that is worse beyond the grid."""
    mine, theirs = dequantized(ours[INT4]), dequantized(GOLDEN / INT4)
    for name in matrices(source):
        our_error = (mine[name] - source[name]).square().unflatten(1, (-1, 128)).sum(-1)
        their_error = (theirs[name] - source[name]).square().unflatten(1, (-1, 128)).sum(-1)
        assert bool((our_error <= their_error * 1.01).all()), name
        assert our_error.sum() < 0.95 * their_error.sum(), name


def test_int4_codes_are_the_nearest(ours: dict[str, Path], source: dict[str, Tensor]) -> None:
    """compressed-tensors' reading of our folder is, weight by weight, the nearest of the 16 values of its group."""
    stored, values = tensors_of(ours[INT4]), dequantized(ours[INT4])
    for name in matrices(source)[:6]:
        scale = stored[name.replace(".weight", ".weight_scale")].float()
        grid = torch.arange(-8, 8) * scale[..., None]  # [O, G, 16]
        distance = (source[name].unflatten(1, (-1, 128))[..., None] - grid[:, :, None, :]).abs().amin(-1)
        assert torch.allclose((values[name] - source[name]).abs().unflatten(1, (-1, 128)), distance, atol=1e-7), name


def test_native_fp8_comes_back_bit_by_bit(ours: dict[str, Path]) -> None:
    """Codes and scales are the release's bytes, and the values that compressed-tensors reads are its exact products."""
    release, mine = tensors_of(GOLDEN / "loads-native-fp8-block"), tensors_of(ours["native"])
    renamed = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in release.items()}
    assert set(renamed) == set(mine)
    for name, tensor in renamed.items():
        assert tensor.dtype == mine[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), mine[name].view(torch.uint8)), name
    read = dequantized(ours["native"])
    checkpoint = open_native(GOLDEN / "loads-native-fp8-block")
    for name, tensor in read.items():
        assert torch.equal(tensor, checkpoint.read(name)), name


@pytest.mark.parametrize("folder", [*PAIRS, "native", "mixed"])
def test_our_reader_reads_ours_as_compressed_tensors_does(ours: dict[str, Path], folder: str) -> None:
    read = open_source(ours[folder])
    for name, tensor in dequantized(ours[folder]).items():
        assert torch.equal(read.read(name), tensor), name


@pytest.mark.parametrize("folder", PEER_FOLDERS)
def test_our_reader_reads_the_peers_as_compressed_tensors_does(folder: str) -> None:
    read = open_source(GOLDEN / folder)
    for name, tensor in dequantized(GOLDEN / folder).items():
        assert torch.equal(read.read(name), tensor), name


def relative_error(values: Tensor, weight: Tensor) -> float:
    return ((values - weight).norm() / weight.norm()).item()


def test_awq_packing_is_autorounds(source: dict[str, Tensor]) -> None:
    """A wrong order of nibbles or zero points gives an error near 1; four bits of Gaussian weights give about 0.1."""
    stored = tensors_of(GOLDEN / "peer-autoround-awq-g128")
    for projection in ("q_proj", "k_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{projection}"
        outputs = len(source[name + ".weight"])
        codes, zeros = (unpack_awq(stored[f"{name}.{part}"], outputs) for part in ("qweight", "qzeros"))
        weight = IntWeight(codes, stored[name + ".scales"].float().T, zeros, 4)
        assert 0.05 < relative_error(dequantize(weight), source[name + ".weight"]) < 0.12


def test_gptq_packing_is_autorounds(source: dict[str, Tensor]) -> None:
    stored = tensors_of(GOLDEN / "peer-autoround-gptq-g128")
    for projection in ("q_proj", "k_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{projection}"
        outputs, inputs = source[name + ".weight"].shape
        codes = unpack_gptq(stored[name + ".qweight"], 4, inputs)
        zeros = unpack_gptq_zeros(stored[name + ".qzeros"], 4, outputs)
        assert bool((zeros == 0).all())  # symmetric: the stored zero point is 8
        weight = IntWeight(codes, stored[name + ".scales"].float().T, zeros, 4)
        assert 0.05 < relative_error(dequantize(weight), source[name + ".weight"]) < 0.12


RELEASE_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.mark.parametrize("layout_name, symmetric", [("awq", False), ("gptq", True)])
def test_awq_and_gptq_folders_have_autorounds_layout(layout_name: str, symmetric: bool, tmp_path: Path) -> None:
    """Same tensors under the release's expert names; the rest stays bfloat16 (the peer casts it to float16)."""
    variant = WeightsVariant(group_size=128, attention="int4", layout=layout_name, symmetric=symmetric)
    folder = write_folder(open_native(GOLDEN / "source-bf16"), variant, tmp_path / "out")
    mine, theirs = layout(folder), layout(GOLDEN / f"peer-autoround-{layout_name}-g128")
    for theirs_name, ours_name in RELEASE_NAMES.items():
        theirs = {name.replace(theirs_name, ours_name): kind for name, kind in theirs.items()}
    assert set(mine) == set(theirs)
    for name, kind in mine.items():
        quantized = name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
        assert kind == (theirs[name] if quantized else (torch.bfloat16, theirs[name][1])), name
    if symmetric:  # zero point 8, stored minus one in every nibble, as AutoRound's words are
        words = [tensor for name, tensor in tensors_of(folder).items() if name.endswith(".qzeros")]
        words += [t for n, t in tensors_of(GOLDEN / "peer-autoround-gptq-g128").items() if n.endswith(".qzeros")]
        assert all(bool((word == 0x77777777).all()) for word in words)


def test_comparison_sees_a_single_wrong_code(ours: dict[str, Path], source: dict[str, Tensor]) -> None:
    """The checks above bite: one nibble of one word changed is a weight that compressed-tensors reads differently."""
    stored: dict[str, Any] = copy.deepcopy(tensors_of(ours[INT4]))
    name = "model.layers.0.block_sparse_moe.experts.3.w2"
    before = dequantized(ours[INT4])[name + ".weight"]
    stored[name + ".weight_packed"][5, 3] ^= 1 << 8
    codes = stored[name + ".weight_packed"]
    scale = stored[name + ".weight_scale"].float().repeat_interleave(128, 1)
    nibbles = torch.stack([(codes >> (4 * i)) & 15 for i in range(8)], -1).flatten(1) - 8
    changed = nibbles * scale != before
    assert changed.sum() == 1
    assert bool(changed[5, 26])
