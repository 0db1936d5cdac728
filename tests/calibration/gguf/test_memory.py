"""Writing a GGUF file holds one layer in memory, and as many experts as the device has room for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.allocations import Allocations
from mmquant.calibration.gguf import memory as gguf_memory
from mmquant.calibration.gguf.layer import quantize_layer
from mmquant.calibration.gguf.memory import (
    ExpertPlan,
    activation_bytes,
    expert_bytes,
    layer_peak,
    least_moments,
    moment_memory,
    pair_bytes,
    plan_experts,
    solve_bytes,
)
from mmquant.calibration.gguf.solve import METHODS, Report
from mmquant.calibration.gguf.streams import Streams
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.statistics.layer_pass import layer_bytes
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.errors import FitError

SCRIPT = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from mmquant.calibration.gguf.run import Calibration
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.plan import GgufPlan, plan_steps
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.gguf.writer import GgufWriter, plan_parts
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.runs.gguf_job import provider_of, write_step

class Made:
    label = "made"
    def __init__(self, layers):
        self.geometry = Geometry(layers, 512, 4, 2, 64, 8, 2, 1024, 256, 32, 5e6, 1e-6, 128)
    def read(self, name):
        g = self.geometry
        shapes = {"embed_tokens": (g.vocab, 512), "lm_head": (g.vocab, 512), "q_proj": (256, 512), "k_proj": (128, 512),
                  "v_proj": (128, 512), "o_proj": (512, 256), "gate.weight": (8, 512), "bias": (8,), "q_norm": (256,),
                  "k_norm": (128,)}
        return torch.randn(next((s for part, s in shapes.items() if part in name), (512,)))
    def read_experts(self, layer, projection, experts, device, dtype):
        return torch.randn(len(experts), *((512, 1024) if projection == "down" else (1024, 512)))

def write(layers, calibrated):
    source = Made(layers)
    variant = GgufVariant(find_mix("Q4_K" if calibrated else "BF16"), "m", calibrated)
    steps = plan_steps(variant, source.geometry)
    plan = GgufPlan("m", steps, tuple(plan_parts("m", {}, tuple(t for s in steps for t in s))))
    tokens = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(0))
    folder = Path(sys.argv[1]) / str(layers)
    writer = GgufWriter(folder, plan.parts)
    provider = provider_of(source, plan, Calibration(tokens, {}, "random") if calibrated else None, "cpu", folder)
    provider.begin(0)
    for step in range(len(plan.steps)):
        write_step(writer, provider, step)
        writer.settle()  # what waits for the disk is bounded by Behind, whose tests measure it
    writer.finish()

for layers in (6, 14):
    write(layers, sys.argv[2] == "calibrated")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
LAYER = 8 * 3 * 512 * 1024 * 4  # bytes of one layer's experts in float32


@pytest.mark.parametrize("how", ["plain", pytest.param("calibrated", marks=pytest.mark.slow)])
def test_peak_memory_does_not_grow_with_layers(tmp_path: Path, how: str) -> None:
    """The peak behind 6 layers and behind 14 more, in one process.

    The allocator needs some layers to settle; then eight more would be eight LAYERs if they were kept, four as bytes.
    """
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (int(line) * 1024 for line in done.stdout.split())
    assert many - few < 2 * LAYER


M27 = Geometry(62, 3072, 48, 8, 128, 256, 8, 1536, 200064, 64, 5e6, 1e-6, 196608)
LENGTH = 256


def layer_of(g: Geometry, device: str, dtype: torch.dtype) -> LayerWeights:
    """Random weights; the last expert is never chosen, the first overflows float16."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype) * 0.05

    def ones(n: int) -> Tensor:
        return torch.ones(n, device=device)

    heads, keys = g.heads * g.head_dim, g.kv_heads * g.head_dim
    up = draw(g.experts, g.expert_width, g.hidden)
    up[0] *= 2.0**16
    bias = torch.zeros(g.experts, device=device)
    bias[-1] = -10
    return LayerWeights(
        *(ones(g.hidden), ones(g.hidden), ones(heads), ones(keys)),
        *(draw(heads, g.hidden), draw(keys, g.hidden), draw(keys, g.hidden), draw(g.hidden, heads)),
        router=draw(g.experts, g.hidden).float(),
        router_bias=bias,
        gate=draw(g.experts, g.expert_width, g.hidden),
        up=up,
        down=draw(g.experts, g.hidden, g.expert_width),
    )


def streams_of(g: Geometry, device: str, memory: int | None, windows: int = 4, batch: int = 2) -> Streams:
    generator = torch.Generator().manual_seed(1)
    states = [HiddenStates(windows, LENGTH, g.hidden) for _ in range(2)]
    start = torch.randn(windows, LENGTH, g.hidden, generator=generator)
    states[0].put(0, start)
    states[1].put(0, start + 0.05 * torch.randn(start.shape, generator=generator))
    return Streams(states[0], states[1], batch, device, memory)


def run(g: Geometry, weights: LayerWeights, streams: Streams, kind: str) -> tuple[dict[str, np.ndarray], Report]:
    types = {f"blk.0.{name}.weight": kind for name in (*ATTENTION_TENSORS, *EXPERT_TENSORS)}
    report = Report()
    return quantize_layer(streams, weights, 0, types, g, METHODS["default"], report), report


@pytest.mark.parametrize("kind", ["Q4_K", "IQ2_XXS"])
def test_chunks_of_experts_give_the_same_bytes_and_streams(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = Geometry(1, 256, 4, 2, 64, 7, 2, 256, 64, 32, 1e4, 1e-6, 512)
    weights = layer_of(g, "cpu", torch.float32)
    monkeypatch.setattr(gguf_memory, "CPU_WORK", 1)
    whole = streams_of(g, "cpu", None)
    assert whole.plan(g) == ExpertPlan(7, 1, 1)
    expected, report = run(g, weights, whole, kind)
    assert report.unseen == {(0, 6)}
    assert set(report.rescaled) == {(0, 0)}
    for held, chunks in ((3, 3), (1, 7)):
        parts = streams_of(g, "cpu", held * expert_bytes(g))
        assert len(parts.plan(g).chunks(7)) == chunks
        found, also = run(g, weights, parts, kind)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], data) for name, data in expected.items())
        assert torch.equal(parts.reference.all(), whole.reference.all())
        assert torch.equal(parts.quantized.all(), whole.quantized.all())
        assert (also.unseen, also.rescaled) == (report.unseen, report.rescaled)


def test_a_chunk_is_a_multiple_of_both_steps() -> None:
    work = 5 * solve_bytes(3072, 3072)
    assert plan_experts(M27, 300 * pair_bytes(3072), work) == ExpertPlan(256, 5, 10)
    assert plan_experts(M27, 48 * pair_bytes(3072), work) == ExpertPlan(40, 5, 10)
    assert plan_experts(M27, 0, 0) == ExpertPlan(1, 1, 1)
    assert least_moments(M27, work) == 10 * pair_bytes(3072)
    assert [len(part) for part in ExpertPlan(45, 5, 15).chunks(256)] == [45] * 5 + [31]


@pytest.mark.parametrize("work", [0, 1 << 29, 4 << 30, 16 << 30])
def test_what_is_free_decides_no_step(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solve of fewer experts may round otherwise on a card: a run that would need one does not begin."""
    monkeypatch.setattr(gguf_memory, "CPU_WORK", work)
    found = set[tuple[int, int]]()
    for free in range(1 << 30, 80 << 30, 77 << 20):
        monkeypatch.setattr(gguf_memory, "free_memory", lambda device, free=free: free)
        try:
            moments = moment_memory(M27, torch.bfloat16, "cpu", 8192)
        except FitError:
            assert not found
            continue
        plan = plan_experts(M27, moments, work)
        assert plan.chunk * expert_bytes(M27) <= moments
        found.add((plan.step, plan.down))
    assert len(found) == 1


def test_m27_fits_a_card_of_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    free, work, tokens = int(25.2e9), (24 << 30) // 6, 8192
    monkeypatch.setattr(gguf_memory, "free_memory", lambda device: free)
    monkeypatch.setattr(gguf_memory, "CPU_WORK", work)
    plan = plan_experts(M27, moment_memory(M27, torch.bfloat16, "cpu", tokens), work)
    assert len(plan.chunks(256)) == 6
    peak = layer_peak(M27, torch.bfloat16, plan, work, activation_bytes(M27, "cpu", tokens))
    assert 0.85 * free < peak < 0.9 * free
    monkeypatch.setattr(gguf_memory, "free_memory", lambda device: int(16e9))
    with pytest.raises(FitError, match=r"layer 0: cpu has 14\.9 GiB of memory free, a layer needs 20\.9 GiB"):
        moment_memory(M27, torch.bfloat16, "cpu", tokens)


@pytest.mark.parametrize("chunk", [4, 12])
def test_tensors_stay_within_the_stated_memory(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = Geometry(1, 512, 4, 2, 64, 12, 2, 256, 64, 32, 1e4, 1e-6, 512)
    weights, work = layer_of(g, "cpu", torch.bfloat16), solve_bytes(512, 512)
    monkeypatch.setattr(gguf_memory, "CPU_WORK", work)
    streams = streams_of(g, "cpu", chunk * expert_bytes(g))
    assert streams.plan(g) == ExpertPlan(chunk, 1, 2)
    with Allocations() as allocations:
        run(g, weights, streams, "Q4_K")
    new = layer_peak(g, torch.bfloat16, streams.plan(g), work, activation_bytes(g, "cpu", 2 * LENGTH))
    new -= layer_bytes(g, torch.bfloat16)  # the layer itself was there
    assert 0.8 * new < allocations.peak <= new


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ2_XXS"])
@pytest.mark.parametrize("chunk", [16, 24])
def test_the_allocators_peak_stays_within_the_stated_memory(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = Geometry(1, 1024, 8, 2, 128, 24, 4, 512, 64, 64, 1e4, 1e-6, 512)
    weights, work = layer_of(g, "cuda", torch.bfloat16), 8 * solve_bytes(1024, 1024)
    monkeypatch.setattr(gguf_memory, "working_memory", lambda device: work)
    plan = plan_experts(g, chunk * expert_bytes(g), work)
    assert plan == ExpertPlan(chunk, 8, 16)

    def peak() -> int:
        streams = streams_of(g, "cuda", chunk * expert_bytes(g), windows=8, batch=4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(g, weights, streams, kind)
        return torch.cuda.max_memory_allocated() - before

    peak()  # kernels are compiled, libraries loaded
    found = peak()
    new = layer_peak(g, torch.bfloat16, plan, work, activation_bytes(g, "cuda", 4 * LENGTH))
    new -= layer_bytes(g, torch.bfloat16)  # the layer itself was there
    assert 0.3 * new < found <= new, f"{found / 1e6:.0f} MB, stated {new / 1e6:.0f} MB"
