"""SignRound of a GGUF layer lowers the error of the experts' output; scales and codebooks stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmquant.calibration.gguf import experts as gguf_experts
from mmquant.calibration.gguf import signround as gguf_learn
from mmquant.calibration.gguf.layer import quantize_layer
from mmquant.calibration.gguf.solve import METHODS, Method, Report
from mmquant.calibration.gguf.streams import Streams
from mmquant.calibration.model.forward import Observer, route, run_experts
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.model.signround_layer import LearnOptions
from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.models.minimax_m2 import EMBED, LayerWeights
from mmquant.convert.open import open_source
from mmquant.convert.source import read_layer
from mmquant.quantize.ggml.codec import decode, unpack
from mmquant.quantize.ggml.types import GGMLType

SOURCE = open_source("demo")
G = SOURCE.geometry
LENGTH = 128


def layer() -> LayerWeights:
    return read_layer(SOURCE, 0)


def streams(windows: int = 24) -> Streams:
    text = bundled("evaluation")
    ids = pack(read_sets([str(text)], load_template(SOURCE)), load_tokenizer(SOURCE), LENGTH, windows).tokens
    hidden = torch.nn.functional.embedding(ids, SOURCE.read(EMBED))
    sides = [HiddenStates(windows, LENGTH, G.hidden) for _ in range(2)]
    for side in sides:
        side.put(0, hidden)
    return Streams(sides[0], sides[1], 8, "cpu")


def solved(method: Method, upper: str, down: str, windows: int = 24) -> tuple[dict[str, np.ndarray], Report]:
    types = {f"blk.0.{name}.weight": "Q6_K" for name in ATTENTION_TENSORS}
    types |= {f"blk.0.{name}.weight": upper for name in EXPERT_TENSORS} | {"blk.0.ffn_down_exps.weight": down}
    report = Report()
    return quantize_layer(streams(windows), layer(), 0, types, G, method, report), report


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_experts, "LearnOptions", lambda **more: LearnOptions(steps=40, batch=256, **more))


@pytest.mark.parametrize("kinds", [("Q2_K", "Q3_K"), ("IQ2_XXS", "Q4_K")])
def test_codes_move_and_scales_stay(kinds: tuple[str, str]) -> None:
    plain, _ = solved(METHODS["default"], *kinds)
    learned, report = solved(METHODS["high"], *kinds)
    assert report.learned[0] is not None
    assert report.learned[0] < 0.97
    for name in EXPERT_TENSORS:
        key = f"blk.0.{name}.weight"
        kind = GGMLType[kinds[name == "ffn_down_exps"]]
        if kind.name == "IQ2_XXS":
            assert np.array_equal(plain[key], learned[key])
            continue
        (grid, codes), (other, turned) = (
            unpack(torch.from_numpy(data[key]).flatten(0, 1), kind, 256) for data in (plain, learned)
        )
        assert torch.equal(grid.step, other.step)
        assert 0 < float((codes != turned).float().mean()) < 0.2


def test_codebooks_alone_have_nothing_to_learn() -> None:
    plain, _ = solved(METHODS["default"], "IQ3_S", "IQ2_S", 2)
    learned, report = solved(METHODS["high"], "IQ3_S", "IQ2_S", 2)
    assert report.learned == {0: None}
    assert all(np.array_equal(plain[key], learned[key]) for key in plain)
    assert list(report.of_layer(0)) == []


def test_held_out_error_is_that_of_the_written_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the layer of the bytes, on the windows that were not learned on, before and after."""
    both, weights, seen = streams(8), layer(), {}
    real = gguf_learn.learn_chunks

    def watched(*args: object, **more: object) -> object:
        seen["tokens"], seen["train"] = args[2], args[3]
        seen["found"] = real(*args, **more)  # type: ignore[arg-type]
        return seen["found"]

    monkeypatch.setattr(gguf_learn, "learn_chunks", watched)
    types = {f"blk.0.{name}.weight": "Q3_K" for name in (*ATTENTION_TENSORS, *EXPERT_TENSORS)}
    before = quantize_layer(streams(8), weights, 0, types, G, METHODS["default"], Report())
    report = Report()
    after = quantize_layer(both, weights, 0, types, G, METHODS["high"], report)
    tokens, train = seen["tokens"], seen["train"]
    x, target = tokens.x[train:], tokens.target[train:]  # type: ignore[attr-defined]
    losses, out = [], torch.empty(0)
    for data in (before, after):
        values = {}
        for name, role in EXPERT_TENSORS.items():
            old = getattr(weights, role)
            rows = torch.from_numpy(data[f"blk.0.{name}.weight"]).flatten(0, 1)
            values[role] = decode(rows, GGMLType.Q3_K, old.shape[-1]).view(old.shape)
        values["router"] = torch.from_numpy(data["blk.0.ffn_gate_inp.weight"])
        made = replace(weights, **values)
        routing = route(x, made.router, made.router_bias, G.experts_per_token)
        out = run_experts(made, x, routing, Observer())
        losses.append(float((out - target).square().mean()))
    assert report.learned[0] == pytest.approx(losses[1] / losses[0], rel=1e-3)
    # What is wanted: from where the written stream enters the experts to where the reference leaves them.
    written, reference = (side.all().flatten(0, 1)[train:] for side in (both.written, both.reference))
    assert torch.allclose(written - out + target, reference, atol=1e-3)
