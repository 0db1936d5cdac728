"""A checkpoint is opened from headers, checked before use, and read exactly."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import CONFIG, write_tiny
from mmquant.convert.checkpoints.checkpoint import open_checkpoint
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.open import open_native
from mmquant.convert.source import read_layer
from mmquant.quantize.fp8 import dequantize_tiles


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder: Path, name: str, value: torch.Tensor | None, new_name: str | None = None) -> None:
    """Rewrite one tensor of a checkpoint (None: leave it out)."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    del tensors[name]
    if value is not None:
        tensors[new_name or name] = value
    save_file(tensors, path)


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def test_every_weight_is_exact(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    source.validate()
    stored = {n: t for shard in sorted(tiny.glob("*.safetensors")) for n, t in load_file(shard).items()}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantize_tiles(tensor, stored[name.removesuffix("weight") + "weight_scale_inv"])
        if not name.endswith("scale_inv"):
            assert torch.equal(source.read(name), tensor.float()), name


def test_a_layer_stacks_its_experts(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    layer = read_layer(source, 2)
    assert layer.gate.shape == (5, 160, 192)
    assert layer.down.shape == (5, 192, 160)
    for expert in range(5):
        name = f"model.layers.2.block_sparse_moe.experts.{expert}."
        assert torch.equal(layer.up[expert], source.read(name + "w3.weight"))
        assert torch.equal(layer.down[expert], source.read(name + "w2.weight"))
    part = read_layer(source, 2, experts=range(1, 3))
    assert torch.equal(part.gate, layer.gate[1:3])


@pytest.mark.parametrize("experts", [1, 4, 7])
def test_geometry_comes_from_the_files(tmp_path: Path, experts: int) -> None:
    folder = write_tiny(tmp_path, num_local_experts=experts, num_experts_per_tok=1)
    source = open_checkpoint(folder)
    source.validate()
    assert source.geometry.experts == experts
    assert sum(kind.weights for kind in source.census() if kind.kind != "scale") == source.geometry.parameters


def test_a_plain_bfloat16_checkpoint_opens(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path, quantization_config=None))
    source.validate()
    assert not source.is_quantized("model.layers.0.self_attn.q_proj")


def test_m27_geometry_counts_its_parameters() -> None:
    config = {
        **CONFIG,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "vocab_size": 200064,
    }
    geometry = Geometry.from_config(config)
    assert geometry.parameters == 228_689_764_864  # the release's count
    assert geometry.kv_bytes_per_token(64) == 253_952


def test_mtp_tensors_are_known_and_skipped(tiny: Path) -> None:
    path = tiny / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.enorm.weight"] = torch.ones(4)
    save_file(tensors, path)
    source = open_checkpoint(tiny)
    source.validate()
    assert list(source.skipped) == ["model.layers.3.enorm.weight"]


def test_the_fingerprint_follows_the_weights_and_not_the_place(tiny: Path, tmp_path: Path) -> None:
    first = open_checkpoint(tiny).fingerprint
    assert open_checkpoint(write_tiny(tmp_path / "copy", shards=5)).fingerprint == first
    assert open_checkpoint(write_tiny(tmp_path / "other", seed=1)).fingerprint != first


def test_missing_and_strange_tensors(tiny: Path) -> None:
    change(tiny, W1, torch.zeros(160, 192).to(torch.float8_e4m3fn), W1.replace("w1", "gate_proj"))
    with pytest.raises(ValueError, match=r"1 tensors are missing, first .*experts\.3\.w1\.weight"):
        open_checkpoint(tiny).validate()


def test_an_unexpected_tensor(tiny: Path) -> None:
    path = shard_of(tiny, W1)
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.experts.9.w1.weight"] = torch.ones(2)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"1 tensors are not part of this model, first .*experts\.9"):
        open_checkpoint(tiny).validate()


def test_wrong_shape_and_wrong_dtype(tiny: Path) -> None:
    change(tiny, W1, torch.zeros(192, 160).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"w1\.weight has shape \[192, 160\], expected \[160, 192\]"):
        open_checkpoint(tiny).validate()
    change(tiny, W1, torch.zeros(160, 192))
    with pytest.raises(ValueError, match=r"w1 is stored as F32 with weight_scale_inv, quantization_config"):
        open_checkpoint(tiny).validate()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_are_finite_and_positive(tiny: Path, bad: float) -> None:
    name = W1 + "_scale_inv"
    scales = load_file(shard_of(tiny, name))[name]
    scales[1, 0] = bad
    change(tiny, name, scales)
    with pytest.raises(ValueError, match=r"w1\.weight_scale_inv holds .*, expected finite and positive"):
        open_checkpoint(tiny).validate()


def test_what_was_found_right_is_not_read_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with several variants validates for each; a model of M2.7's size has 47,864 scales."""
    source, read = open_checkpoint(tiny), list[str]()
    original = source.read_scales
    monkeypatch.setattr(source, "read_scales", lambda name: read.append(name) or original(name))
    source.validate(scales=False)
    assert read == []
    source.validate()
    assert read
    assert len(read) == len(set(read))
    notes, before = list(source.notes), list(read)
    source.validate()
    assert (source.notes, read) == (notes, before)


def test_missing_and_truncated_shards(tiny: Path) -> None:
    shard = tiny / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"00002-of-00003.*truncated"):
        open_checkpoint(tiny)
    shard.write_bytes(whole[:6])
    with pytest.raises(ValueError, match="too short"):
        open_checkpoint(tiny)
    shard.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="followed by other bytes"):
        open_checkpoint(tiny)
    shard.unlink()
    with pytest.raises(ValueError, match="1 shards of the index are missing, first model-00002"):
        open_checkpoint(tiny)


def test_every_flipped_header_byte_is_an_error_or_harmless(tiny: Path) -> None:
    """A damaged header never crashes: either the damage shows, or the checkpoint still validates (a JSON space)."""
    shard = tiny / "model-00001-of-00003.safetensors"
    whole = shard.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for position in [*range(9), *range(9, length + 8, 97)]:
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 0x21]) + whole[position + 1 :])
        with contextlib.suppress(ValueError):
            open_checkpoint(tiny).validate(scales=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "architecture is LlamaForCausalLM"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', expected sigmoid"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected silu"),
        ({"use_qk_norm": False}, "use_qk_norm is False, expected true"),
        ({"attn_type_list": [1, 0, 1]}, r"attn_type_list is \[1, 0, 1\], expected 1"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_key_value_heads": 4}, "6 heads are not a multiple of 4"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected fp8"),
    ],
)
def test_configs_of_something_else(tiny: Path, changes: dict[str, object], message: str) -> None:
    (tiny / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tiny)


def test_the_demo_opens_by_name() -> None:
    source = open_native("demo")
    source.validate()
    assert source.geometry.parameters == 14_438_208
