"""Held-out rows turn error feedback away where it errs more than a plain search, and the report says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mmquant.calibration.folder.guard import TOGETHER, guarded
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.report import LayerReport, plainly_rounded
from mmquant.calibration.folder.solve import solve
from mmquant.calibration.model.forward import layer_forward
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.collector import Collector
from mmquant.calibration.statistics.held import FEWEST, HELD, STRIDE, HeldRows
from mmquant.convert.open import open_source
from mmquant.convert.source import read_layer
from mmquant.quantize.fp4.grid import NVFP4
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import IntWeight, dequantize
from mmquant.quantize.integer.panel import Solved
from mmquant.quantize.moments import Moments

N = 64
GRIDS = [GptqGrid(4, 32), GptqGrid(4, 32, symmetric=False), NVFP4]


def rows(count: int, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed))


def moments_of(x: Tensor, held: Tensor | None) -> Moments:
    """Two matrices that saw the same rows [R, N]."""
    second = (x.T @ x).expand(2, -1, -1).clone()
    count, one = torch.full((2,), float(len(x))), torch.ones(2)
    diagonal = second.diagonal(dim1=1, dim2=2).clone()
    return Moments(count, count.clone(), second, diagonal, diagonal.clone(), one, one, one, torch.zeros(2), held)


@pytest.mark.parametrize("grid", GRIDS)
def test_feedback_that_errs_more_on_held_rows_is_turned_away(grid: GptqGrid) -> None:
    """The sums call three directions loud that the first expert's rows know nothing of; the second's agree with them.

    What is turned away is the plain search, bit for bit; nothing else changes.
    """
    lie = rows(3, seed=7)
    honest = rows(400, seed=1)
    held = torch.stack((rows(HELD, seed=2), 100 * rows(HELD, 3, 3) @ lie))
    options = LayerOptions(grid=grid, prior=0.0, floor=0.0, sampling=0.0, damping=1e-3)
    weight = torch.stack((rows(16, seed=4), rows(16, seed=5)))
    seen = moments_of(torch.cat((100 * rows(300, 3, 6) @ lie, honest)), held)
    found = solve(weight, seen, slice(None), options, stacked=2)
    assert found.plain is not None
    assert bool(found.plain[0].all())
    assert not bool(found.plain[1].any())
    without = solve(weight, dataclasses.replace(seen, held=None), slice(None), options, stacked=2)
    assert torch.equal(dequantize(found.weight)[1], dequantize(without.weight)[1])
    second = seen.second
    assert second is not None
    importance = (second / seen.weight.view(-1, 1, 1)).diagonal(dim1=1, dim2=2)
    plain = dequantize(grid.round_nearest(weight[:1], importance[:1]))
    assert torch.equal(dequantize(found.weight)[:1], plain)
    errors = [
        ((weight[0] - v) @ held[0].T).square().sum()
        for v in (dequantize(found.weight)[0], dequantize(without.weight)[0])
    ]
    assert float(errors[0]) < float(errors[1])


def test_one_of_stacked_matrices_alone() -> None:
    """The rows are loud where the second matrix's feedback put its errors; the first's lie elsewhere."""
    grid, weight = GptqGrid(4, 32), rows(16, seed=4).unsqueeze(0)
    nearest = grid.round_nearest(weight, torch.ones(1, N))
    worse = dataclasses.replace(nearest, codes=nearest.codes.clone(), scales=nearest.scales.clone())
    worse.codes[:, 8:, 0] += 1
    nothing = torch.zeros(1)
    solved = Solved(worse, None, nothing, nothing.bool())
    found = guarded(weight, solved, grid, (torch.ones(1, N), rows(HELD, seed=8).unsqueeze(0)), 2)
    assert found.plain is not None
    assert found.plain.tolist() == [[False, True]]
    assert torch.equal(dequantize(found.weight), dequantize(nearest))
    assert list(plainly_rounded([(found, dataclasses.replace(found, plain=torch.zeros(1, 1, dtype=torch.bool)))])) == [
        "up of expert 0"
    ]


def test_every_matrix_that_is_turned_away_gets_its_own_rounding() -> None:
    """More of them than are rounded at a time."""
    grid, count = GptqGrid(4, 32), TOGETHER + 3
    weight = torch.stack([rows(8, seed=e) for e in range(count)])
    ones = torch.ones(count, N)
    nearest = grid.round_nearest(weight, ones)
    worse = dataclasses.replace(nearest, codes=nearest.codes.clone(), scales=nearest.scales.clone())
    worse.codes[1:, :, 0] += 1  # the first is as good as the plain one: places and matrices differ
    solved = Solved(worse, None, torch.zeros(count), torch.zeros(count).bool())
    held = rows(HELD, seed=8).expand(count, -1, -1)
    found = guarded(weight, solved, grid, (ones, held), 1)
    assert found.plain is not None
    assert found.plain.flatten().tolist() == [False, *[True] * (count - 1)]
    assert torch.equal(dequantize(found.weight), dequantize(nearest))


def test_where_nothing_is_turned_away_nothing_is_rounded_again() -> None:
    """A batch of no matrices has strides of its own, which the kernels of a GPU refuse."""
    asked: list[int] = []

    class Counting(GptqGrid):
        def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
            asked.append(len(weight))
            return super().round_nearest(weight, importance)

    grid, x = Counting(4, 32), rows(400)
    seen = moments_of(x, torch.stack((x[:HELD], x[:HELD])))
    options = LayerOptions(grid=grid, prior=0.0, floor=0.0, sampling=0.0, damping=1e-3)
    found = solve(torch.stack((rows(16, seed=4), rows(16, seed=5))), seen, slice(None), options)
    assert found.plain is not None
    assert not bool(found.plain.any())
    assert asked == [2]


def test_too_few_rows_decide_nothing() -> None:
    held = HeldRows.empty(2, {"x": N}, "cpu")
    x = rows(STRIDE * (2 * FEWEST - 1))
    ends = [0, STRIDE * FEWEST, len(x)]
    share = torch.cat((torch.full((ends[1],), 0.5), torch.ones(len(x) - ends[1])))
    first = list(range(STRIDE // 2, len(x), STRIDE))
    assert held.take(ends, share, x=x).tolist() == first
    assert held.count == [FEWEST, FEWEST - 1]
    assert torch.equal(held.of("x")[0, :FEWEST], 0.5 * x[first[:FEWEST]])
    assert not bool(held.of("x")[1].any())
    held.take([0, 0, 20 * STRIDE * HELD], None, x=rows(20 * STRIDE * HELD))
    assert held.count[1] == HELD


def test_a_rank_fills_its_own_places() -> None:
    held = dataclasses.replace(HeldRows.empty(2, {"x": N}, "cpu"), places=range(96, HELD))
    x = rows(STRIDE * HELD)
    assert len(held.take([0, STRIDE * 3, len(x)], None, x=x)) == 3 + HELD - 96
    assert torch.equal(held.rows["x"][0, 96:99], x[STRIDE // 2 : STRIDE * 3 : STRIDE])
    assert torch.equal(held.rows["x"][1, 96:], x[STRIDE * 3 + STRIDE // 2 :: STRIDE][: HELD - 96])
    assert not bool(held.rows["x"][:, :96].any() or held.rows["x"][0, 99:].any())


def test_held_rows_are_in_no_sum_of_a_pass() -> None:
    """Sums with and without holding differ by the held rows, in every moment of a layer."""
    source = open_source("demo")
    g, weights = source.geometry, read_layer(source, 1)
    hidden = rows(2 * 160, g.hidden).view(2, 160, g.hidden)
    found = []
    for hold in (False, True):
        collector = Collector(1, weights, g, Collect(), 1, hold=hold)
        for start in range(2):
            collector.begin(start, 160, torch.zeros(1, dtype=torch.int64))
            layer_forward(weights, g, hidden[start : start + 1], collector)
        counts = collector.held["experts"].rows if hold else {}
        found.append((collector.statistics(), counts))
    (whole, _), (rest, kept) = found
    pairs = [(getattr(whole, name), getattr(rest, name)) for name in ("expert_in", "expert_mid")]
    for (all_rows, some), held in zip(pairs, (kept["x"], kept["h"]), strict=True):
        assert float(held.abs().amax((1, 2)).min()) > 0
        assert torch.allclose(all_rows.second, some.second + held.mT @ held, rtol=1e-4, atol=1e-4)
        assert torch.allclose(rest.expert_in.weight, rest.expert_mid.weight, rtol=1e-4)
        assert bool((some.weight < all_rows.weight).all())
    for name in ("attention_in", "attention_out"):
        all_rows, some = getattr(whole, name), getattr(rest, name)
        assert some.held is not None
        assert float(some.count) == float(some.weight) == 2 * 160 - 2 * 160 // STRIDE
        assert torch.allclose(all_rows.second, some.second + some.held.mT @ some.held, rtol=1e-4, atol=1e-4)
        assert whole.attention_in.held is None


def test_the_report_names_them() -> None:
    assert list(LayerReport(3, plain=("down of expert 5", "q_proj")).lines()) == [
        "layer 3: down of expert 5, q_proj rounded without error feedback, which held-out rows say is worse"
    ]
