"""Chunks of experts bound the working memory of a layer's solve, by CUDA's own allocator."""

from __future__ import annotations

import pytest
import torch

from mmquant.calibration.folder.layer import quantize_layer
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.solve import LARGEST_WORK, expert_chunks, working_memory
from mmquant.calibration.statistics.layer import LayerStatistics, RoutingStatistics
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.quantize.moments import Moments

HIDDEN, WIDTH, EXPERTS = 1024, 512, 24


def layer(device: str) -> LayerWeights:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.05

    ones = torch.ones(HIDDEN, device=device)
    return LayerWeights(
        *(ones, ones, ones, ones),
        *(draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN), draw(HIDDEN, HIDDEN)),
        router=draw(EXPERTS, HIDDEN).float(),
        router_bias=torch.zeros(EXPERTS, device=device),
        gate=draw(EXPERTS, WIDTH, HIDDEN),
        up=draw(EXPERTS, WIDTH, HIDDEN),
        down=draw(EXPERTS, HIDDEN, WIDTH),
    )


def moments(matrices: int, n: int) -> Moments:
    """On the CPU, as a card that cannot hold those of all experts has them."""
    x = torch.randn(matrices, 2 * n, n, generator=torch.Generator().manual_seed(n))
    second, rows = x.mT @ x, torch.full((matrices,), 2.0 * n)
    diagonal, one = second.diagonal(dim1=1, dim2=2).clone(), torch.ones(matrices)
    return Moments(rows, rows.clone(), second, diagonal, diagonal.clone(), one, one, one, torch.zeros(matrices))


def statistics() -> LayerStatistics:
    none = torch.zeros(1)
    routing = RoutingStatistics(none, none, none, none, none)
    first, mid = moments(EXPERTS, HIDDEN), moments(EXPERTS, WIDTH)
    return LayerStatistics(0, moments(1, HIDDEN), moments(1, HIDDEN), first, mid, routing, none, none, none)


def test_chunks_hold_what_the_memory_holds() -> None:
    weights = layer("cpu")
    each = 4 * 7 * HIDDEN * 2 * WIDTH
    assert [len(c) for c in expert_chunks(weights, 10 * each)] == [10, 10, 4]
    assert len(list(expert_chunks(weights, 0))) == EXPERTS
    assert working_memory(torch.device("cpu")) == LARGEST_WORK


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("experts", [2, 8])
def test_the_allocators_peak_stays_within_the_stated_memory(experts: int) -> None:
    weights, known = layer("cuda"), statistics()
    memory = experts * 4 * 7 * HIDDEN * 2 * WIDTH
    geometry = Geometry(1, HIDDEN, 8, 8, 128, EXPERTS, 2, WIDTH, 64, 64, 1e4, 1e-6, 64)
    quantize_layer(0, weights, known, LayerOptions(memory=memory), geometry)  # kernels compiled, libraries loaded
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = quantize_layer(0, weights, known, LayerOptions(memory=memory), geometry)
    kept = sum(w.codes.nbytes + w.scales.nbytes for w in found.experts.values())
    # Codes are there twice while the chunks' are joined.
    assert torch.cuda.max_memory_allocated() - before <= memory + 2 * kept
