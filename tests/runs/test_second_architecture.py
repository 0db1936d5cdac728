"""A second architecture is one module and one row: every command of folders works on it, and its forward is right."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmquant
from helpers import mixtral, qwen3_moe
from helpers.paths import PACKAGE, ROOT
from helpers.tiny import write_tiny
from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.checkpoints.quantized_folder import QuantizedFolder
from mmquant.convert.checkpoints.store import LocalFolder
from mmquant.convert.gguf.reader import GgufSource
from mmquant.convert.models import ARCHITECTURES, architecture_of
from mmquant.convert.source import Source, read_globals, read_layer
from mmquant.errors import InputError

DEMO = PACKAGE / "data" / "demo"
TOKENS = torch.randint(0, 2048, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random Qwen3-MoE in FP8 tiles with the demo's tokenizer, while the table has the row."""
    monkeypatch.setitem(ARCHITECTURES, qwen3_moe.ROW.model_type, qwen3_moe.ROW)
    folder = write_tiny(tmp_path / "model", **qwen3_moe.CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    outside = read_globals(source)
    hidden = embed(outside, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    return final_logits(outside, source.geometry, hidden)


def by_transformers(source: Checkpoint, tokens: torch.Tensor, family: str) -> torch.Tensor:
    """Logits by transformers in float32; its checkpoints stack the experts under `mlp`."""
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    names = [n for n in source.tensors if ".experts." not in n and not n.endswith("scale_inv")]
    state = {name.replace(source.names.moe, "mlp"): source.read(name) for name in names}
    for number in range(source.geometry.layers):
        layer = read_layer(source, number)
        state[f"model.layers.{number}.mlp.experts.gate_up_proj"] = torch.cat((layer.gate, layer.up), 1)
        state[f"model.layers.{number}.mlp.experts.down_proj"] = layer.down
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("renormalize", [True, False])
def test_its_forward_is_that_of_transformers(model: Path, renormalize: bool) -> None:
    config = json.loads((model / "config.json").read_text()) | {"norm_topk_prob": renormalize}
    (model / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(model)
    source.validate()
    theirs = by_transformers(source, TOKENS, "Qwen3Moe")
    assert float((logits(source, TOKENS) - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_a_row_without_norms_of_q_and_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral: softmax routing, no norms of q and k, the names of MiniMax-M2's experts."""
    monkeypatch.setitem(ARCHITECTURES, mixtral.ROW.model_type, mixtral.ROW)
    source = open_checkpoint(write_tiny(tmp_path / "model", **mixtral.CONFIG))
    source.validate()
    assert read_layer(source, 0).q_norm is None
    theirs = by_transformers(source, TOKENS, "Mixtral")
    assert float((logits(source, TOKENS) - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_without_its_row_it_is_refused() -> None:
    with pytest.raises(InputError, match="architecture is Qwen3MoeForCausalLM, expected MiniMaxM2ForCausalLM"):
        architecture_of(qwen3_moe.CONFIG)


def test_fp8_keeps_its_values(model: Path, tmp_path: Path) -> None:
    found = mmquant.inspect(str(model))
    assert found.geometry.experts == 5
    assert {kind.kind for kind in found.kinds} >= {"expert gate_proj", "expert up_proj", "expert down_proj", "router"}
    out = mmquant.quantize_fp8(str(model), tmp_path / "fp8").path
    before, after = open_checkpoint(model), open_checkpoint(out)
    for layer in range(2):
        one, other = read_layer(before, layer), read_layer(after, layer)
        assert one.router_bias is None
        for field in ("q_norm", "router", "q", "gate", "down", "up"):
            assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.mark.parametrize(("method", "layout"), [("gptq", "compressed-tensors"), ("awq", "awq")])
def test_calibrated_int4_and_eval(model: Path, tmp_path: Path, method: str, layout: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:20000])
    given = {"text": (str(text),), "windows": 6, "context": 64}
    statistics = tmp_path / "statistics"
    mmquant.calibrate(str(model), statistics, mmquant.CalibrateOptions(moments="full", **given))
    options = mmquant.Int4Options(
        method=method, format=layout, group_size=32, attention="int4", tp=1, statistics=statistics
    )
    out = mmquant.quantize_int4(str(model), tmp_path / "int4", options).path
    source, found = open_checkpoint(model), QuantizedFolder(LocalFolder(out))
    found.validate()
    ignore = found.quantization.get("ignore", found.quantization.get("modules_to_not_convert"))
    assert ignore
    assert not any("block_sparse" in entry for entry in ignore)
    exact, rounded = logits(source, TOKENS), logits(found, TOKENS)
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.5
    scored = mmquant.EvalOptions(text=(str(ROOT / "CONTRIBUTING.md"),), windows=2, context=64)
    evaluated = mmquant.evaluate(str(out), str(model), scored)
    assert evaluated is not None
    assert evaluated.document["candidates"][0]["kld"]["mean"] > 0


def test_learned_rounding_needs_no_bias(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:20000])
    options = mmquant.Int4Options(group_size=32, effort="high", tp=1, text=(str(text),), windows=6, context=64)
    out = mmquant.quantize_int4(str(model), tmp_path / "int4", options).path
    QuantizedFolder(LocalFolder(out)).validate()


def test_gguf_goes_both_ways(model: Path, tmp_path: Path) -> None:
    out = mmquant.quantize_gguf(str(model), tmp_path / "gguf", mmquant.GgufOptions(type="BF16")).path
    found, source = GgufSource(out), open_checkpoint(model)
    found.validate()
    assert found.metadata["general.architecture"] == "qwen3moe"
    assert found.metadata["qwen3moe.expert_gating_func"] == 1
    assert "blk.0.exp_probs_b.bias" not in found.files[0].tensors
    assert replace(found.geometry, norm_eps=source.geometry.norm_eps) == source.geometry  # float32 in the file
    exact = logits(source, TOKENS)
    assert float((logits(found, TOKENS) - exact).norm() / exact.norm()) < 0.02
