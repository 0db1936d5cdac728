"""Checkpoints as people have them: every FP8, skip lists, extra tensors, missing or stale configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.ct_reader import dequantized
from helpers.paths import GOLDEN
from helpers.tiny import write_tiny
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.checkpoints.quantization_config import SchemeBook
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.checkpoints.store import LocalFolder
from mmquant.convert.folder.fp8 import Fp8Variant
from mmquant.convert.models.minimax_m2.names import NAMES
from mmquant.convert.open import open_native, open_source
from mmquant.errors import InputError
from mmquant.runs.folder import write_folder

FP8 = ["peer-llmc-mf-fp8-block", "peer-llmc-mf-fp8-dynamic"]
Q, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.block_sparse_moe.experts.3.w1"


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("scheme", ["block", "channel"])
def test_compressed_tensors_fp8_is_a_source(name: str, scheme: str, tmp_path: Path) -> None:
    source = open_native(GOLDEN / name)
    source.validate()
    wanted = dequantized(GOLDEN / name)
    for weight in (n for n in wanted if n.endswith("_proj.weight") or ".experts." in n):
        assert torch.equal(source.read(weight), wanted[weight]), weight
    assert torch.equal(
        source.read_experts(0, "down", range(1, 4), "cpu", torch.float32)[1],
        source.read("model.layers.0.block_sparse_moe.experts.2.w2.weight"),
    )
    written = QuantizedFolder(LocalFolder(write_folder(source, Fp8Variant(scheme), tmp_path / "out")))
    same = (scheme == "block") == (name == FP8[0])
    assert torch.equal(written.read(Q + ".weight"), source.read(Q + ".weight")) == same


@pytest.mark.parametrize("shape", ["channel", "flat", "tensor"])
def test_fp8_with_a_scale_a_channel_or_matrix(shape: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", shards=1)
    path, config = folder / "model-00001-of-00001.safetensors", json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    tensors = {n: t for n, t in load_file(path).items() if not n.endswith("scale_inv")}
    for name, tensor in list(tensors.items()):
        if tensor.dtype == torch.float8_e4m3fn:
            scale = torch.rand(len(tensor), 1) + 0.5
            stored = {"channel": scale, "flat": scale[:, 0].clone(), "tensor": scale[0, 0].clone()}[shape]
            tensors[name.removesuffix("weight") + "weight_scale"] = stored
    save_file(tensors, path)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(folder)
    source.validate()
    scale = tensors[Q + ".weight_scale"].reshape(-1, 1)
    assert torch.equal(source.read(Q + ".weight"), tensors[Q + ".weight"].float() * scale)
    stacked = source.read_experts(0, "gate", range(3, 4), "cpu", torch.float32)[0]
    assert torch.equal(stacked, source.read(EXPERT + ".weight"))


def test_integers_are_no_source() -> None:
    for name in ("peer-llmc-mf-w4a16-g128-sym", "peer-autoround-awq-g128", "loads-ct-mix-attnfp8-expw4"):
        with pytest.raises(InputError, match="quantize the original instead"):
            open_native(GOLDEN / name).validate()
        assert isinstance(open_source(GOLDEN / name), QuantizedFolder)
    assert isinstance(open_source(GOLDEN / FP8[0]), Checkpoint)


SKIPS = [  # quantization_config, matrix, what vLLM, SGLang and transformers make of it: whether it is left as it is
    ("fp8", ["gate", "lm_head", "e_score_correction_bias"], EXPERT, (False, False, False)),
    ("fp8", [Q], Q, (True, True, True)),
    ("fp8", ["self_attn"], Q, (False, True, False)),
    ("fp8", ["model.layers.0."], Q, (False, True, True)),
    ("fp8", ["model.layers.0"], Q.replace("layers.0", "layers.01"), (False, False, True)),
    ("fp8", ["q_proj"], Q, (False, True, True)),
    ("fp8", ["proj"], Q, (False, False, True)),
    ("fp8", ["model.layers.0.mlp.experts"], EXPERT, (True, False, True)),
    ("fp8", ["model.layers.0.block_sparse_moe.experts"], EXPERT, (False, True, True)),
    ("fp8", ["re:.*self_attn.*"], Q, (False, False, False)),
    ("awq", ["gate"], EXPERT, (False, False, False)),
    ("awq", ["self_attn"], Q, (True, True, False)),
    ("awq", ["mlp"], EXPERT, (True, False, False)),
]


@pytest.mark.parametrize(("method", "entries", "name", "wanted"), SKIPS)
def test_skip_lists_as_each_engine_matches_them(
    method: str, entries: list[str], name: str, wanted: tuple[bool, bool, bool]
) -> None:
    book = SchemeBook(
        {"quant_method": method, "modules_to_not_convert": entries, "weight_block_size": [128, 128]}, NAMES
    )
    assert tuple(scheme is None for _, scheme in book.readings(name)) == wanted


def rewritten(folder: Path, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    """A tiny checkpoint of one shard with tensors added, replaced or (None) left out."""
    write_tiny(folder, shards=1, **config)
    path = folder / "model-00001-of-00001.safetensors"
    tensors = {**load_file(path), **change}
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    (folder / "model.safetensors.index.json").unlink()
    return folder


EXTRAS = [
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    Q + ".input_scale",
    EXPERT + ".input_scale",
    "model.layers.0.self_attn.k_proj.k_scale",
    "model.layers.0.self_attn.attn.v_scale",
    "model.layers.0.self_attn.k_scale",
]


@pytest.mark.parametrize("name", EXTRAS)
def test_extra_tensors_are_skipped_and_reported(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(rewritten(tmp_path / "m", {name: torch.ones(1)}))
    source.validate()
    assert [name in note for note in source.notes] == [True]
    assert any(kind.kind == "extra (skipped)" for kind in source.census())


@pytest.mark.parametrize("name", [Q + ".bias", "model.layers.0.extra.weight", EXPERT + ".scale", "inv_freq"])
def test_unknown_tensors_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not part of this model"):
        open_checkpoint(rewritten(tmp_path / "m", {name: torch.ones(1)})).validate()


def test_a_tied_flag_beside_a_head(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path / "m", tie_word_embeddings=True))
    source.validate()
    assert "tie_word_embeddings" in source.notes[0]
    assert not torch.equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight"))


def test_a_config_that_was_lost_or_left_behind(tmp_path: Path) -> None:
    plain, fp8 = write_tiny(tmp_path / "plain", quantization_config=None), write_tiny(tmp_path / "fp8")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, fp8)]
    for folder, config, said in ((plain, configs[1], "left behind"), (fp8, configs[0], "lost")):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"quantization_config.*{said}"):
            open_checkpoint(folder).validate()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    ],
)
def test_files_of_another_kind_are_named(data: bytes, said: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", shards=1)
    (folder / "model-00001-of-00001.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=said):
        open_checkpoint(folder)
