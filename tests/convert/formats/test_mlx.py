"""MLX folders, ours and mlx_lm's own: mlx reads the values that we read, bit for bit; hostile ones give one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.paths import GOLDEN
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.folder.doctor import examine_folder
from mmquant.convert.folder.kinds import Kind
from mmquant.convert.folder.mlx import BF16, MlxVariant, kind
from mmquant.convert.formats.mlx import pack_codes, unpack_codes
from mmquant.convert.open import open_native, open_source
from mmquant.errors import InputError
from mmquant.quantize.affine.grid import BITS
from mmquant.runs.folder import write_folder

MODEL = GOLDEN / "source-bf16"
STACK = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"
EIGHT = kind("affine", 8, 64)
MIXED = (("layers.0.gate", kind("affine", 2, 64)), ("layers.0.up", kind("affine", 3, 128)), ("head", EIGHT))
VARIANTS = {
    **{f"affine-{bits}": (kind("affine", bits, 64), EIGHT, BF16) for bits in BITS},
    "mxfp4": (kind("mxfp4", 0, 0), kind("mxfp4", 0, 0), BF16),
    "nvfp4": (kind("nvfp4", 0, 0), EIGHT, EIGHT),
    "mixed": (kind("affine", 4, 32), BF16, kind("affine", 5, 32), MIXED),
}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_codes_are_one_stream_of_bits(bits: int, words: int, rows: int, seed: int) -> None:
    """By the definition: bit k of a row is bit k % 32 of its word k // 32; codes follow one another."""
    codes = torch.randint(0, 1 << bits, (rows, 32 * words), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, words * bits)
    for row, found in zip(codes.tolist(), packed.view(torch.int32).tolist(), strict=True):
        whole = sum(code << (bits * place) for place, code in enumerate(row))
        assert [word % 2**32 for word in found] == [(whole >> (32 * i)) % 2**32 for i in range(words * bits)]
    assert torch.equal(unpack_codes(packed, bits), codes.float())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("mlx")

    def write(name: str) -> Path:
        out = folder / name
        return out if out.exists() else write_folder(open_native(MODEL), MlxVariant(*VARIANTS[name]), out)

    return write


def values_of_mlx(folder: Path) -> dict[str, Tensor]:
    """What mx.dequantize makes of every module that mlx_lm finds quantized, in float32, by module (and expert)."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed (extra mlx)")
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if "scales" not in module:
            continue
        parts: dict[str, Any] = {n: module[n] for n in ("weight", "scales", "biases", "global_scale") if n in module}
        parts = {n: part for n, part in parts.items() if part is not None}
        stacked = parts["weight"].ndim == 3
        for expert in range(parts["weight"].shape[0] if stacked else 1):
            own = {n: part[expert] if stacked else part for n, part in parts.items()}
            if "biases" in own:
                own |= {n: own[n].astype(mx.float32) for n in ("scales", "biases")}
            how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
            value = mx.dequantize(own.pop("weight"), **own, **how)
            found[f"{name}:{expert}" if stacked else name] = torch.from_numpy(np.array(value))
    return found


def compare(folder: Path) -> int:
    """How many matrices of a folder mlx and we read alike, bit for bit; all must be."""
    source, values = open_source(folder), values_of_mlx(folder)
    assert isinstance(source, QuantizedFolder)
    for name, value in values.items():
        module, _, expert = name.partition(":")
        place = source.names.stack_of(module)
        known = module if place is None else source.names.expert(place[0], int(expert), place[1])
        assert torch.equal(source.read(known + ".weight"), value), name
    return len(values)


@pytest.mark.parametrize("name", ["affine-2", "affine-3", "affine-5", "affine-6", "mxfp4", "nvfp4", "mixed"])
def test_mlx_reads_what_we_read(written: Callable[[str], Path], name: str) -> None:
    experts, beside = 3 * 4, {"nvfp4": 6, "mixed": 2}.get(name, 4)
    assert compare(written(name)) == experts + beside


OWN: dict[str, dict[str, Any]] = {
    "4 bits": {"q_bits": 4},
    "mixed_3_4": {"quant_predicate": "mixed_3_4", "q_group_size": 64},
    "nvfp4": {"q_mode": "nvfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
}


@pytest.mark.parametrize("how", OWN.values(), ids=OWN)
def test_mlx_lms_own_folders(tmp_path: Path, how: dict[str, Any]) -> None:
    """Router, embeddings and head quantized, by its recipes: everything is read, and nothing found wrong."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (extra mlx)")
    import mlx.core as mx
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(MODEL, model_config={"shared_intermediate_size": 0})
    model.set_dtype(mx.bfloat16)
    predicate = {}
    if "quant_predicate" in how:
        predicate["quant_predicate"] = mixed_quant_predicate_builder(how["quant_predicate"], model, 64)
    bits, group = how.get("q_bits"), how.get("q_group_size")
    model, config = quantize_model(model, config, group, bits, mode=how.get("q_mode", "affine"), **predicate)
    save_model(tmp_path / "out", model)
    save_config(config, tmp_path / "out" / "config.json")
    assert compare(tmp_path / "out") == 3 * 4 + 4 + 1 + 2
    found = open_source(tmp_path / "out")
    found.validate()
    assert isinstance(found, QuantizedFolder)
    assert examine_folder(found) == []


def test_router_norms_and_bias_keep_their_bytes(written: Callable[[str], Path]) -> None:
    ours = {k: v for path in written("mixed").glob("*.safetensors") for k, v in load_file(path).items()}
    source = load_file(MODEL / "model.safetensors")
    plain = [n for n in source if "norm" in n or n.endswith((".gate.weight", "correction_bias"))]
    assert len(plain) == 7
    for name in plain:
        assert torch.equal(ours[name], source[name]), name


def test_config_names_what_differs(written: Callable[[str], Path]) -> None:
    config = json.loads((written("mixed") / "config.json").read_text())
    said = config["quantization"]
    assert said == config["quantization_config"]
    assert "quant_method" not in said
    assert (said["bits"], said["group_size"], said["mode"]) == (2, 64, "affine")
    assert said[STACK] == {"group_size": 128, "bits": 3, "mode": "affine"}
    assert said["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert not [name for name in said if "self_attn" in name or name.endswith(".gate")]
    assert config["shared_intermediate_size"] == 0


def test_unnamed_modules_are_what_their_tensors_say(written: Callable[[str], Path], tmp_path: Path) -> None:
    """As mlx_lm 0.32 infers it: the entries are for older ones."""
    shutil.copytree(written("mixed"), tmp_path / "o")
    config = json.loads((tmp_path / "o/config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    assert torch.equal(open_source(tmp_path / "o").read(name), open_source(written("mixed")).read(name))


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"bits": 7}, "bits is 7, expected"),
    ({"bits": True}, "bits is true"),
    ({"bits": 4.0}, "bits is 4.0"),
    ({"group_size": 48}, "group_size is 48, expected"),
    ({"mode": "affin"}, "mode is 'affin'"),
    ({"mode": ["affine"]}, "mode is "),
    ({"mode": "nvfp4", "bits": 4}, "group_size is 64, expected 16"),
    ({STACK: 5}, "expected an object, true or false"),
    ({STACK: {"bits": "3"}}, "bits is '3'"),
    ({STACK: {"bits": 8, "group_size": 64}}, "has shape"),
    ({STACK: False}, "leaves it unquantized"),
    ({"model.layers.0.self_attn.q_proj": {"bits": 4}}, "is stored as BF16"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_hostile_config_gives_one_line(
    written: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    shutil.copytree(written("mixed"), tmp_path / "o")
    config = json.loads((tmp_path / "o/config.json").read_text())
    config["quantization"] |= change
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        open_source(tmp_path / "o").read("model.layers.0.block_sparse_moe.experts.0.w3.weight")
    assert words.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def shapeless(tensors: dict[str, Tensor]) -> None:
    tensors[STACK + ".weight"] = tensors[STACK + ".weight"].view(torch.int32).flatten(0, 1).view(torch.uint32)


def fewer(tensors: dict[str, Tensor]) -> None:
    tensors[STACK + ".biases"] = tensors[STACK + ".biases"][:2].clone()


def empty(tensors: dict[str, Tensor]) -> None:
    tensors[STACK + ".weight"] = torch.zeros(4, 0, dtype=torch.uint8)


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[STACK + ".scales"][3, 1, 0] = torch.inf


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[STACK + ".biases"]


BROKEN = [
    (shapeless, "expected 4 experts first"),
    (fewer, "expected 4 experts first"),
    (empty, "0 bytes for an expert"),
    (infinite, "scales is not finite"),
    (missing, "biases is missing"),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", "words"))
def test_broken_tensors_give_one_line(
    written: Callable[[str], Path], tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    shutil.copytree(written("mixed"), tmp_path / "o")
    (shard,) = (tmp_path / "o").glob("*.safetensors")
    tensors = load_file(shard)
    spoil(tensors)
    save_file(tensors, shard)
    with pytest.raises(InputError, match=words):
        open_source(tmp_path / "o").read("model.layers.0.block_sparse_moe.experts.3.w3.weight")


def test_what_does_not_divide_is_refused() -> None:
    other = MlxVariant(Kind("mlx-4-g96", kind("affine", 4, 64).storage, 4, 96), BF16, BF16)
    with pytest.raises(InputError, match="group size 96 does not divide 256 inputs"):
        write_folder(open_native(MODEL), other, Path("never"))
