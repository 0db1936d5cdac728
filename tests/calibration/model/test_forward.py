"""The streamed forward equals transformers and slow loops, and holds one layer in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.random_layer import SMALL
from helpers.tiny import write_tiny
from helpers.transformers_model import in_transformers
from mmquant.calibration.model.forward import (
    Observer,
    Routing,
    embed,
    final_logits,
    grouped_matmul,
    layer_forward,
    moe,
    rms_norm,
    route,
    run_experts,
)
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer

transformers = pytest.importorskip("transformers")


def streamed(source: Checkpoint, tokens: torch.Tensor, observer: Observer | None = None) -> torch.Tensor:
    model = read_globals(source)
    hidden = embed(model, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden, observer)
    return final_logits(model, source.geometry, hidden)


def reference(source: Checkpoint, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and the chosen experts of each layer by transformers in float32."""
    model = in_transformers(source)
    chosen: list[torch.Tensor] = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    with torch.no_grad():
        return model(tokens).logits, chosen


class Choices(Observer):
    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []

    def moe_input(self, x: torch.Tensor, routing: Routing) -> None:
        self.chosen.append(routing.chosen)


def demo_tokens(count: int) -> torch.Tensor:
    source = open_native("demo")
    text = Path(torch.__file__).read_text()[:60000]
    return windows(text, load_tokenizer(source), 256, count)


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    source = open_native("demo") if name == "demo" else open_checkpoint(write_tiny(tmp_path))
    generator = torch.Generator().manual_seed(3)
    tokens = demo_tokens(6) if name == "demo" else torch.randint(0, 320, (3, 70), generator=generator)
    watch = Choices()
    ours = streamed(source, tokens, watch)
    theirs, chosen = reference(source, tokens)
    same = torch.ones(tokens.numel(), dtype=torch.bool)
    for mine, other in zip(watch.chosen, chosen, strict=True):
        same &= (mine.sort(-1).values == other.sort(-1).values).all(-1)
    flips = int((~same).sum())
    assert flips <= 0.001 * tokens.numel()
    # A flip in one token reaches later tokens of its window through attention; compare windows without any.
    whole = same.view(tokens.shape).all(-1)
    assert bool(whole.any())
    assert float((ours - theirs)[whole].abs().max()) < 1e-3


def test_bfloat16_compute_stays_close(tmp_path: Path) -> None:
    source = open_native("demo")
    tokens = demo_tokens(2)
    model = read_globals(source, dtype=torch.bfloat16)
    hidden = embed(model, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer, dtype=torch.bfloat16), source.geometry, hidden)
    exact = torch.log_softmax(streamed(source, tokens), -1)
    rounded = torch.log_softmax(final_logits(model, source.geometry, hidden), -1)
    assert float((exact.exp() * (exact - rounded)).sum(-1).mean()) < 0.01


def test_experts_are_the_weighted_sum_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write_tiny(tmp_path))
    weights, g = read_layer(source, 1), source.geometry
    x = torch.randn(23, g.hidden)
    routing = route(x, weights.router, weights.router_bias, g)
    expected = torch.zeros(23, g.hidden)
    for token in range(23):
        for slot in range(g.experts_per_token):
            expert = int(routing.chosen[token, slot])
            gate, up = weights.gate[expert] @ x[token], weights.up[expert] @ x[token]
            out = weights.down[expert] @ (gate * torch.sigmoid(gate) * up)
            expected[token] += routing.weights[token, slot] * out
    assert torch.allclose(run_experts(weights, x, routing, Observer()), expected, atol=1e-5)
    monkeypatch.setattr("mmquant.calibration.model.forward.ROWS", 10)  # several expert batches
    assert torch.allclose(run_experts(weights, x, routing, Observer()), expected, atol=1e-5)


def test_routing_selects_by_biased_score_and_weighs_by_unbiased() -> None:
    x, router = torch.eye(3), torch.tensor([[2.0, 0, 0], [1, 0, 0], [0, 0, 0], [-1, 0, 0]])
    routing = route(x, router, torch.tensor([0.0, 0.0, 0.0, 9.0]), SMALL)
    assert sorted(routing.chosen[0].tolist()) == [0, 3]
    scores = torch.sigmoid(torch.tensor([2.0, -1.0]))
    assert torch.allclose(routing.weights[0].sort(descending=True).values, scores / scores.sum())


def test_observers_see_rows_sorted_by_expert(tmp_path: Path) -> None:
    source = open_checkpoint(write_tiny(tmp_path))
    weights, g = read_layer(source, 0), source.geometry
    hidden = torch.randn(2, 9, g.hidden)

    class Watch(Observer):
        def moe_input(self, x: torch.Tensor, routing: Routing) -> None:
            self.x, self.routing = x, routing

        def experts(self, x, h, y, token, slot, offsets) -> None:  # type: ignore[no-untyped-def]
            assert offsets[-1] == 2 * 9 * g.experts_per_token
            for expert in range(g.experts):
                rows = slice(offsets[expert], offsets[expert + 1])
                assert bool((self.routing.chosen[token[rows], slot[rows]] == expert).all())
                assert torch.equal(x[rows], self.x[token[rows]])
                assert torch.allclose(y[rows], h[rows] @ weights.down[expert].T, atol=1e-5)

    moe(weights, g, hidden, Watch())


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 1], [7, 0, 0]])
def test_grouped_matmul_is_each_experts_product(counts: list[int]) -> None:
    weight = torch.randn(3, 4, 6)
    x = torch.randn(sum(counts), 6)
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    out = grouped_matmul(x, weight, offsets)
    for expert in range(3):
        rows = slice(offsets[expert], offsets[expert + 1])
        assert torch.allclose(out[rows], x[rows] @ weight[expert].T, atol=1e-6)


def test_rms_norm_in_float32() -> None:
    x = torch.tensor([[3.0, 4.0]]) * 1e4
    assert torch.allclose(rms_norm(x, torch.ones(2), 0.0), x / x.pow(2).mean().sqrt())


MEMORY = """
import resource, sys, threading, time
import torch
torch.set_num_threads(1)
from mmquant.calibration.model.forward import layer_forward
from mmquant.convert.checkpoints.checkpoint import open_checkpoint
from mmquant.convert.source import read_layer
from pathlib import Path
source = open_checkpoint(Path(sys.argv[1]))
hidden = torch.zeros(1, 8, source.geometry.hidden)
layer_forward(read_layer(source, 0), source.geometry, hidden)
first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number in range(1, source.geometry.layers):
    hidden = layer_forward(read_layer(source, number), source.geometry, hidden)
last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((last - first) * 1024)
"""


def test_peak_memory_is_one_layer(tmp_path: Path) -> None:
    """Six more layers of 64 MB each (as float32) may raise the peak by less than one of them (two are never held)."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 20, "num_hidden_layers": 7}
    folder = write_tiny(tmp_path, **sizes)
    run = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    layer = 4 * 20 * 3 * 512 * 512
    assert int(run.stdout) < layer
