"""The parts of the two-stream pass equal their definitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.run_cases import model
from mmquant.calibration.gguf.layer import quantize_layer
from mmquant.calibration.gguf.maxima import Largest
from mmquant.calibration.gguf.memory import ExpertPlan
from mmquant.calibration.gguf.moments import Pair, corrected
from mmquant.calibration.gguf.solve import METHODS, Report
from mmquant.calibration.gguf.streams import (
    Streams,
    input_pairs,
    leaving_pairs,
    output_pair,
    pass_attention,
    pass_experts,
    rescaled,
    router_pair,
)
from mmquant.calibration.model.forward import Observer, attention, embed, layer_forward, rms_norm, route
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.open import open_source
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.ggml.factor import factor_moments


def rows(count: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def filled(x: Tensor, z: Tensor, share: Tensor | None = None) -> Pair:
    pair = replace(Pair.empty(1, x.shape[1], "cpu"), held=None)
    for part in range(0, len(x), 7):  # added in pieces
        piece = slice(part, part + 7)
        pair.add(0, x[piece], z[piece], None if share is None else share[piece])
    return pair


def test_sums_are_weighted_by_the_squared_share() -> None:
    x, z, share = rows(40, 5), rows(40, 5, 1), rows(40, 1, 2).flatten().abs()
    pair = filled(x, z, share)
    weight = share.square().diag()
    assert torch.allclose(pair.own[0], z.T @ weight @ z, atol=1e-4)
    assert torch.allclose(pair.cross[0], x.T @ weight @ z, atol=1e-4)
    assert float(pair.rows[0]) == 40
    assert torch.allclose(pair.weight[0], share.square().sum())


def test_correction_is_the_least_squares_map() -> None:
    """T = argmin sum |W x - T z|^2 + ridge, by torch's own solver on the stacked rows."""
    x, weight = rows(300, 6), rows(4, 6, 3)
    z = x @ (torch.eye(6) + 0.3 * rows(6, 6, 4)) + 0.1 * rows(300, 6, 5)
    own, cross = (part / 300 for part in (z.T @ z, x.T @ z))
    found = corrected(weight.unsqueeze(0), own[None], cross[None], factor_moments(own[None], 1e-7))[0]
    expected = torch.linalg.lstsq(z, x @ weight.T).solution.T
    assert torch.allclose(found, expected, atol=1e-3)


def test_equal_streams_need_no_correction() -> None:
    x, weight = rows(50, 6), rows(3, 6, 1)
    own, cross = filled(x, x).means(slice(None))
    assert torch.allclose(corrected(weight.unsqueeze(0), own, cross, factor_moments(own))[0], weight, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), 0.0])
def test_without_moments_weights_stay(bad: float) -> None:
    moments, weight = torch.full((1, 6, 6), bad), rows(3, 6).unsqueeze(0)
    assert torch.equal(corrected(weight, moments, moments, factor_moments(moments)), weight)


def test_an_expert_without_rows_takes_the_pool() -> None:
    pair = replace(Pair.empty(2, 6, "cpu"), held=None)
    x, z = rows(500, 6), rows(500, 6, 1)
    pair.add(0, x, z)
    own, cross = pair.means(slice(None), prior=1.0, floor=0.0, sampling=0.0)
    assert torch.allclose(own[1], z.T @ z / 500, rtol=1e-4, atol=1e-5)
    assert torch.allclose(cross[1], x.T @ z / 500, rtol=1e-4, atol=1e-5)
    assert torch.allclose(own[0], own[1], rtol=1e-4, atol=1e-5)


def test_the_cure_keeps_the_layers_output_and_bounds_the_sums() -> None:
    source = open_source("demo")
    tokens = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    hidden = embed(read_globals(source), tokens)
    for layer in range(3):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    weights = read_layer(source, 3)
    exponents = torch.zeros(16)
    exponents[3], exponents[11] = 5, 4
    better = rescaled(weights, exponents)
    assert torch.equal(better.gate, weights.gate)
    assert torch.equal(layer_forward(better, source.geometry, hidden), layer_forward(weights, source.geometry, hidden))
    both = streams_at(hidden)
    _, before = input_pairs(both, weights, source.geometry, range(16))
    _, after = input_pairs(both, better, source.geometry, range(16))
    assert torch.equal(before / torch.exp2(exponents), after)


def streams_at(hidden: Tensor) -> Streams:
    """Both streams at the same hidden states, one window at a time."""
    windows, length, channels = hidden.shape
    states = [HiddenStates(windows, length, channels) for _ in range(2)]
    for side in states:
        side.put(0, hidden)
    return Streams(states[0], states[1], 1, "cpu")


def test_both_streams_pass_a_layer_as_the_forward_does() -> None:
    """Nothing is quantized: own and cross moments agree, and both streams leave the layer where the forward ends."""
    source = open_source("demo")
    g, weights = source.geometry, read_layer(source, 1)
    tokens = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    hidden = embed(read_globals(source), tokens)
    both = streams_at(hidden)
    pairs = [output_pair(both, weights, replace(weights), g)]
    pass_attention(both, weights, g)
    first, largest = input_pairs(both, weights, g, range(16))
    pairs += [first, leaving_pairs(both, weights, replace(weights), g, torch.zeros(16))]
    pass_experts(both, both.quantized, weights, g)
    for pair in pairs:
        assert torch.allclose(pair.own, pair.cross, rtol=1e-4, atol=1e-3)
    assert first.held is not None
    assert float(first.rows.sum()) + sum(first.held.count) == sum(first.held.met) == 2 * 64 * g.experts_per_token
    watch = Largest(g.experts)
    expected = layer_forward(weights, g, hidden, watch)
    assert torch.allclose(largest, watch.sums)
    for side in (both.reference, both.quantized):
        assert float((side.all() - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_routers_rows_are_those_that_it_sees() -> None:
    """In bfloat16 where the experts are."""
    source = open_source("demo")
    g, weights = source.geometry, read_layer(source, 1, "cpu", torch.bfloat16)
    hidden = rows(7, g.hidden).view(1, 7, g.hidden)
    pair = router_pair(streams_at(hidden), weights, g)
    x = rms_norm(hidden, weights.post_norm, g.norm_eps)[0].bfloat16().float()
    assert torch.equal(pair.own[0], x.T @ x)


def test_what_the_stream_lacks_is_summed_with_the_rows_that_add_to_it() -> None:
    """Drift of every expert's w2 and of o, by their definition: d z^T, rows counted by their squared router weight."""
    source = open_source("demo")
    g, weights = source.geometry, read_layer(source, 1)
    tokens = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(0))
    hidden = embed(read_globals(source), tokens)
    both = streams_at(hidden)
    lacking = 0.1 * hidden * rows(1, g.hidden, 1).abs()
    both.quantized.put(0, hidden - lacking)
    seen = Watched()
    attention(weights, g, hidden - lacking, seen)
    pair = output_pair(both, weights, replace(weights), g)
    assert pair.held is not None
    assert pair.drift is not None
    sums = pair.drift[0] + pair.held.d[0].T @ pair.held.z[0]
    expected = lacking.flatten(0, 1).T @ seen.output
    assert torch.allclose(sums, expected, atol=1e-4 * float(expected.abs().max()))
    pass_attention(both, weights, g)
    lacking = (both.reference.all() - both.quantized.all()).flatten(0, 1)
    x, z = (rms_norm(s.all(), weights.post_norm, g.norm_eps).flatten(0, 1) for s in (both.reference, both.quantized))
    routing = route(x, weights.router, weights.router_bias, g)
    pair = leaving_pairs(both, weights, weights, g, torch.zeros(g.experts))
    assert pair.held is not None
    assert pair.drift is not None
    for expert in range(g.experts):
        token, slot = (routing.chosen == expert).nonzero(as_tuple=True)
        inner = F.silu(z[token] @ weights.gate[expert].T) * (z[token] @ weights.up[expert].T)
        square = routing.weights[token, slot].square().unsqueeze(1)
        sums = pair.drift[expert] + pair.held.d[expert].T @ pair.held.z[expert]
        assert torch.allclose(sums, (lacking[token] * square).T @ inner, rtol=1e-3, atol=1e-5)


class Watched(Observer):
    """Keeps what o sees."""

    output: Tensor

    def attention_output(self, x: Tensor) -> None:
        self.output = x


def test_experts_solved_one_by_one_have_their_own_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes, however many experts' moments are held and however many are solved at once."""
    source = open_source(model(tmp_path / "model"))
    g, weights = source.geometry, read_layer(source, 1)
    tokens = torch.randint(0, g.vocab, (4, 32), generator=torch.Generator().manual_seed(0))
    hidden = embed(read_globals(source), tokens)
    types = {f"blk.1.{name}.weight": "Q4_0" for name in (*ATTENTION_TENSORS, *EXPERT_TENSORS)}
    found = []
    for plan in (ExpertPlan(3, 3, 3), ExpertPlan(3, 1, 1), ExpertPlan(2, 1, 2)):
        monkeypatch.setattr(Streams, "plan", lambda *_, plan=plan: plan)
        found.append(quantize_layer(streams_at(hidden), weights, 1, types, g, METHODS["default"], Report()))
    assert g.experts == 3
    for name, data in found[0].items():
        assert all(np.array_equal(data, other[name]) for other in found[1:]), name
