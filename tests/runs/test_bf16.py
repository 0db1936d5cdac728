"""BF16 folders hold the FP8 reader's values bit for bit, and transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mmquant
from helpers.killed import killed_at
from helpers.paths import GOLDEN
from helpers.tiny import write_tiny
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer
from mmquant.errors import InputError
from mmquant.runs.options import Bf16Options


def logits(source: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    model = read_globals(source)
    hidden = embed(model, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    return final_logits(model, source.geometry, hidden)


@pytest.mark.parametrize("model", ["demo", "tiny", "channels"])
def test_values_are_the_fp8_readers_bit_for_bit(model: str, tmp_path: Path) -> None:
    given: str | Path = "demo" if model == "demo" else write_tiny(tmp_path / "tiny")
    if model == "channels":
        given = mmquant.quantize_fp8(str(given), tmp_path / "fp8", mmquant.Fp8Options(scheme="channel")).path
    out = mmquant.dequantize_bf16(str(given), tmp_path / "out").path
    before, after = open_native(given), open_checkpoint(out)
    after.validate()
    assert after.book is None
    for name in before.matrices():
        value = after.raw(name + ".weight")
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before.read(name + ".weight").bfloat16()), name
    rest = [name for name in after.tensors if name.removesuffix(".weight") not in set(before.matrices())]
    assert all(torch.equal(after.raw(name), before.raw(name)) for name in rest)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


def test_what_is_not_fp8_keeps_its_bytes(tmp_path: Path) -> None:
    source = GOLDEN / "source-bf16"
    out = mmquant.dequantize_bf16(source, tmp_path / "out").path
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert all(torch.equal(after.raw(name), before.raw(name)) for name in after.tensors)


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = mmquant.dequantize_bf16(str(write_tiny(tmp_path / "tiny")), tmp_path / "out").path
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = model(tokens).logits
    assert float((theirs - logits(open_checkpoint(out), tokens)).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_a_killed_run_continues_with_equal_bytes(tmp_path: Path) -> None:
    model, options = str(write_tiny(tmp_path / "tiny")), Bf16Options(max_shard_size=300_000)
    whole = mmquant.dequantize_bf16(model, tmp_path / "whole", options).path
    cut = tmp_path / "cut"
    count = 3
    while killed_at(cut, count, lambda: mmquant.dequantize_bf16(model, cut, options)):
        count += 9
    assert count > 3
    names = sorted(p.name for p in whole.iterdir())
    assert names == sorted(p.name for p in cut.iterdir() if not p.name.startswith(".mmquant"))  # the lock of a dead run
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 1
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in weights)


def test_a_dry_run_writes_nothing_and_int4_is_refused(tmp_path: Path) -> None:
    plan = mmquant.dequantize_bf16("demo", tmp_path / "out", dry_run=True)
    source = open_native("demo")
    assert plan.bytes > 1.9 * source.geometry.expert_weights
    assert not (tmp_path / "out").exists()
    int4 = mmquant.quantize_int4("demo", tmp_path / "int4", mmquant.Int4Options(method="rtn", group_size=32)).path
    with pytest.raises(InputError, match="expected"):
        mmquant.dequantize_bf16(int4, tmp_path / "again")
