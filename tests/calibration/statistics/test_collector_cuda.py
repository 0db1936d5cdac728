"""The fused CUDA collector equals the plain one; equal runs give equal bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.calibration_cases import tensors
from helpers.random_layer import HIDDEN, SMALL, random_layer
from mmquant.calibration.model.forward import layer_forward
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.collector import Collector
from mmquant.calibration.statistics.collector_cuda import FusedCollector, collector_for
from mmquant.calibration.statistics.layer import LayerStatistics
from mmquant.convert.models.layer import LayerWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


# Grouped products on a GPU want rows of a multiple of 16 bytes.
G = replace(SMALL, expert_width=48)


def collect(kind: type[Collector], weights: LayerWeights, chosen: Collect) -> LayerStatistics:
    collector = kind(0, weights, G, chosen, 2)
    for start in range(0, len(HIDDEN), 2):
        part = HIDDEN[start : start + 2].cuda()
        collector.begin(start, HIDDEN.shape[1], torch.arange(start, start + len(part)) % 2)
        layer_forward(weights, G, part, collector)
    return collector.statistics()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_plain(full: bool, dtype: torch.dtype) -> None:
    cuda = {k: v.cuda() for k, v in vars(random_layer(G)).items()}
    weights = LayerWeights(**{k: v.to(dtype) if v.dim() > 1 and k != "router" else v for k, v in cuda.items()})
    assert collector_for(weights, Collect(full)) is FusedCollector
    plain, fused = (collect(kind, weights, Collect(full)) for kind in (Collector, FusedCollector))
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    others = tensors(fused)
    for name, value in tensors(plain).items():
        scale = max(1.0, float(value.abs().max()))
        assert float((value - others[name]).abs().max()) <= tolerance * scale, name
    again = tensors(collect(FusedCollector, weights, Collect(full)))
    assert all(torch.equal(value, again[name]) for name, value in others.items())
