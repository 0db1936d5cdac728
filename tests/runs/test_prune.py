"""Pruned checkpoints: the experts of a list or by saliency, a router cut to match, in BF16 and FP8."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmquant
from helpers.paths import ROOT
from helpers.tiny import write_tiny
from mmquant.calibration.model.forward import Observer, Routing, embed, final_logits, layer_forward
from mmquant.calibration.statistics.store import open_statistics
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.checkpoints.pruned import PrunedCheckpoint, most_salient
from mmquant.convert.hub.card import read_manifest
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.open import demo_folder
from mmquant.convert.source import read_globals, read_layer
from mmquant.errors import InputError

KEPT = ((0, 2, 4), (1, 2, 3), (0, 1, 4))
WRITERS: dict[str, Callable[..., mmquant.Quantized]] = {
    "bf16": lambda model, out, **how: mmquant.dequantize_bf16(model, out, mmquant.Bf16Options(**how)),
    "block": lambda model, out, **how: mmquant.quantize_fp8(model, out, mmquant.Fp8Options(**how)),
    "channel": lambda model, out, **how: mmquant.quantize_fp8(model, out, mmquant.Fp8Options(scheme="channel", **how)),
}


def cut(weights: LayerWeights, kept: tuple[int, ...]) -> LayerWeights:
    """A layer without the other experts, by definition."""
    rows = list(kept)
    assert weights.router_bias is not None
    experts = {name: getattr(weights, name)[rows] for name in ("gate", "down", "up")}
    return replace(weights, router=weights.router[rows], router_bias=weights.router_bias[rows], **experts)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = write_tiny(tmp_path / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo_folder() / name).read_bytes())
    return str(folder)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_list_leaves_exactly_those(model: str, tmp_path: Path, writer: str) -> None:
    (tmp_path / "kept.json").write_text(json.dumps({"experts_kept": KEPT}))
    out = WRITERS[writer](model, tmp_path / "out", experts_kept=tmp_path / "kept.json").path
    before, after = open_checkpoint(Path(model)), open_checkpoint(out)
    after.validate()
    assert after.config["num_local_experts"] == after.geometry.experts == 3
    assert json.loads((out / "experts_kept.json").read_text())["experts_kept"] == [list(layer) for layer in KEPT]
    made = read_manifest(out)["artifacts"][0]["provenance"]
    assert made["run"]["experts"] == 3
    assert "--experts-kept" in made["command_line"]  # what the card says
    for layer, kept in enumerate(KEPT):
        found, wanted = read_layer(after, layer), cut(read_layer(before, layer), kept)
        for field in ("router", "router_bias", "input_norm", "gate", "down", "up", "q"):
            one, other = getattr(found, field), getattr(wanted, field)
            if writer == "bf16" and field in ("gate", "down", "up", "q"):
                other = other.bfloat16().float()
            if writer == "channel" and field in ("gate", "down", "up", "q"):
                assert float((one - other).norm() / other.norm()) < 0.04, field
            else:
                assert torch.equal(one, other), field


def test_transformers_routes_among_those(model: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "kept.json").write_text(json.dumps(KEPT))
    out = WRITERS["bf16"](model, tmp_path / "out", experts_kept=tmp_path / "kept.json").path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(0, 2048, (2, 30), generator=torch.Generator().manual_seed(1))
    source = open_checkpoint(out)
    outside = read_globals(source)
    hidden = embed(outside, tokens)
    for layer in range(3):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    ours = final_logits(outside, source.geometry, hidden)
    with torch.no_grad():
        assert float((loaded(tokens).logits - ours).abs().max()) < 1e-4 * float(ours.abs().max())


class Means(Observer):
    """REAP's criterion by its definition: mean of router weight times |output| over an expert's tokens."""

    def __init__(self, experts: int) -> None:
        self.total, self.count = [0.0] * experts, [0] * experts

    def moe_input(self, x: Tensor, routing: Routing) -> None:
        self.routing = routing

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        for expert in range(len(offsets) - 1):
            for row in range(offsets[expert], offsets[expert + 1]):
                weight = float(self.routing.weights[token[row], slot[row]])
                self.total[expert] += weight * float(y[row].double().norm())
                self.count[expert] += 1


def test_saliency_keeps_what_reap_keeps_and_eval_measures_it(model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:12000])
    statistics = tmp_path / "statistics"
    options = mmquant.CalibrateOptions(moments="diagonal", text=(str(text),), windows=4, context=64)
    mmquant.calibrate(model, statistics, options)
    out = WRITERS["block"](model, tmp_path / "out", experts=3, statistics=statistics).path
    kept = json.loads((out / "experts_kept.json").read_text())["experts_kept"]
    source, stored = open_checkpoint(Path(model)), open_statistics(statistics)
    tokens = windows_of(source, text)
    hidden = embed(read_globals(source), tokens)
    for layer in range(3):
        watch = Means(5)
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden, watch)
        means = [total / count if count else -1.0 for total, count in zip(watch.total, watch.count, strict=True)]
        assert kept[layer] == sorted(sorted(range(5), key=lambda e: -means[e])[:3])
        assert stored.layer(layer).routing.tokens_per_expert.tolist() == watch.count
    scored = mmquant.EvalOptions(text=(str(ROOT / "CONTRIBUTING.md"),), windows=2, context=64)
    evaluated = mmquant.evaluate(str(out), model, scored)
    assert evaluated is not None
    candidate = evaluated.document["candidates"][0]
    assert candidate["kld"]["mean"] > 0
    assert {layer["expert_overlap"] for layer in candidate["layers"]} == {None}
    assert "agree least" not in evaluated.table()


def windows_of(source: Checkpoint, text: Path) -> Tensor:
    from mmquant.calibration.text.corpus import pack_windows, read_sets
    from mmquant.calibration.text.tokenizer import load_tokenizer

    return pack_windows(read_sets([str(text)], None), load_tokenizer(source), 64, 4).tokens


def test_experts_that_saw_nothing_go_first() -> None:
    saliency, load = torch.tensor([0.0, 4.0, 9.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 5.0])
    assert most_salient([saliency], [load], 2) == ((1, 2),)
    assert most_salient([saliency], [load], 3) == ((1, 2, 3),)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[[0, 1], [1, 2]]", "2 layers, the model has 3"),
        ("[[0, 1], [1, 2], [2]]", "layer 2 has 1, layer 0 has 2"),
        ("[[0, 1], [1, 1], [2, 3]]", "layer 1 names an expert twice"),
        ("[[0, 5], [1, 2], [2, 3]]", "names 5, the model has experts 0 to 4"),
        ("[[-1, 2], [1, 2], [2, 3]]", "the model has experts 0 to 4"),
        ("[[0], [1], [2]]", "1 of each layer, a token goes to 2"),
        ('[["0", 1], [1, 2], [2, 3]]', "layer 0 is .*, expected numbers of experts"),
        ("[[true, 1], [1, 2], [2, 3]]", "expected numbers of experts"),
        ('{"experts": []}', "expected a list of lists"),
        ("[", "is not JSON"),
    ],
)
def test_wrong_lists_are_one_line(model: str, tmp_path: Path, said: str, words: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(said)
    with pytest.raises(InputError, match=words):
        WRITERS["bf16"](model, tmp_path / "out", experts_kept=path)
    assert not (tmp_path / "out" / "config.json").exists()


def test_names_in_any_order_are_renumbered_once(model: str) -> None:
    """An expert whose new number is another's old one is not lost when the other comes later in the shards."""
    source = open_checkpoint(Path(model))
    straight = PrunedCheckpoint(source, KEPT)
    source.tensors = dict(reversed(source.tensors.items()))
    turned = PrunedCheckpoint(source, KEPT)
    assert turned.tensors == straight.tensors
    assert turned.expected().keys() == turned.tensors.keys()


def test_a_pruned_source_is_another_source(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(Path(model))
    one, other = PrunedCheckpoint(source, KEPT), PrunedCheckpoint(source, (KEPT[0], KEPT[0], KEPT[2]))
    source.validate()
    read = list[str]()
    original = one.read_scales
    monkeypatch.setattr(one, "read_scales", lambda name: read.append(name) or original(name))
    one.validate()  # what was found right in the whole source is said of that one
    assert read
    assert len({source.fingerprint, one.fingerprint, other.fingerprint}) == 3
    with pytest.raises(InputError, match="--scheme native copies"):
        mmquant.quantize_fp8(one, Path("nowhere"), mmquant.Fp8Options(scheme="native"))
