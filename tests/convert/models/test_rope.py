"""RoPE scaling: both spellings are read, computed as transformers and llama.cpp do, and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import llamacpp
from helpers.tiny import CONFIG, write_tiny
from mmquant.calibration.model.forward import embed, final_logits, layer_forward, rotary_tables
from mmquant.convert.checkpoints.checkpoint import open_checkpoint
from mmquant.convert.folder.variant import quantized_config
from mmquant.convert.folder.weights import WeightsVariant
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.models.rope import RopeScaling, same_scaling
from mmquant.convert.open import demo_folder
from mmquant.convert.source import Source, read_globals, read_layer
from mmquant.errors import InputError
from mmquant.runs.gguf_job import write_gguf

transformers = pytest.importorskip("transformers")

YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.5},
    "yarn, mscale": {"rope_type": "yarn", **YARN, "mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn, betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
    "linear": {"rope_type": "linear", "factor": 2.0},
}


def new_form(scaling: dict[str, Any]) -> dict[str, Any]:
    """config.json of transformers 5: everything in rope_parameters, nothing beside it."""
    config = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "rotary_dim")}
    return {**config, "rope_parameters": {**scaling, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}


def old_form(scaling: dict[str, Any]) -> dict[str, Any]:
    """The release's own form: rope_scaling with `type`, theta and rotary_dim beside it."""
    return {**CONFIG, "rope_scaling": {"type": scaling["rope_type"], **scaling}}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("form", [new_form, old_form])
def test_tables_are_those_of_transformers(scaling: dict[str, Any], form: Any) -> None:
    config = form(scaling)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    theirs = transformers.MiniMaxM2Config(**plain)
    module = transformers.models.minimax_m2.modeling_minimax_m2.MiniMaxM2RotaryEmbedding(theirs)
    cos, sin = module(torch.zeros(1), torch.arange(300)[None])
    mine = rotary_tables(Geometry.from_config(config), 300, torch.device("cpu"))
    assert torch.allclose(mine[0], cos[0], atol=2e-5)
    assert torch.allclose(mine[1], sin[0], atol=2e-5)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("form", [new_form, old_form])
def test_written_config_says_the_same(scaling: dict[str, Any], form: Any, tmp_path: Path) -> None:
    config = form(scaling)
    folder = write_tiny(tmp_path / "model", shards=1)
    (folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(folder)
    written = quantized_config(source, WeightsVariant(group_size=32).quantization_config(source))
    assert Geometry.from_config(written) == source.geometry
    for key in ("rope_parameters", "rope_scaling"):  # each alone says all of it, whichever an engine reads
        alone = {k: v for k, v in written.items() if k not in {"rope_parameters", "rope_scaling"} - {key}}
        assert Geometry.from_config(alone) == source.geometry


def test_a_context_is_what_yarn_makes_of_it() -> None:
    assert Geometry.from_config(old_form(SCALINGS["yarn"])).max_context == 512
    scaling = {**SCALINGS["yarn"], "original_max_position_embeddings": 512}
    assert Geometry.from_config(old_form(scaling)).max_context == 2048


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default"}}, "contradict"),
        ({"rope_theta": "5e6"}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rotary_dim": 15}, "rotary_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}},
            "layer types",
        ),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        Geometry.from_config({**CONFIG, **change})


@pytest.mark.parametrize("scaling", [{"type": "default"}, {"rope_type": "yarn", "factor": 1.0}, None, {}])
def test_nothing_to_scale(scaling: dict[str, Any] | None) -> None:
    assert Geometry.from_config({**CONFIG, "rope_scaling": scaling}).rope_scaling is None


def scaled_gguf(folder: Path, scaling: dict[str, Any]) -> tuple[Source, Path]:
    """(a tiny model with YaRN, its GGUF in F32)."""
    model = write_tiny(folder / "model", shards=1, vocab_size=2048, rope_scaling=scaling, head_dim=64, rotary_dim=32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, model)
    source = open_checkpoint(model)
    path = write_gguf(source, GgufVariant(find_mix("F32"), "tiny-F32", importance=False), folder / "gguf")
    return source, path


@pytest.mark.parametrize("name", ["yarn", "yarn, attention factor", "yarn, mscale", "linear"])
def test_llama_cpp_computes_what_the_forward_does(name: str, tmp_path: Path) -> None:
    llamacpp.need()
    source, path = scaled_gguf(tmp_path, SCALINGS[name])
    read_back = GgufSource(path)
    assert same_scaling(read_back.geometry.rope_scaling, source.geometry.rope_scaling)
    assert read_back.geometry.max_context == source.geometry.max_context
    tokens = torch.randint(0, 2048, (1, 200), generator=torch.Generator().manual_seed(0))
    model, hidden = read_globals(read_back), embed(read_globals(read_back), tokens)
    for layer in range(read_back.geometry.layers):
        hidden = layer_forward(read_layer(read_back, layer), read_back.geometry, hidden)
    mine = final_logits(model, read_back.geometry, hidden)[0].numpy()
    theirs = llamacpp.logits(path, tokens.tolist(), exact=True)[0]
    assert np.abs(mine - theirs).mean() < 0.01 * np.abs(mine).mean()


def test_betas_that_llama_cpp_does_not_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beta_fast"):
        scaled_gguf(tmp_path, SCALINGS["yarn, betas"])


def test_close_numbers_are_the_same_scaling() -> None:
    one = RopeScaling("yarn", 4.0, 2048, 1.1)
    assert same_scaling(one, RopeScaling("yarn", 4.0, 2048, float(np.float32(1.1))))
    assert not same_scaling(one, RopeScaling("yarn", 4.0, 2048, 1.2))
    assert not same_scaling(one, RopeScaling("yarn", 4.0, 4096, 1.1))
    assert not same_scaling(one, None)
