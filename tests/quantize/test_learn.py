"""Learned rounding, AWQ scales and exact rewritings: each against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmquant.quantize.awq import output_error, round_scaled, search_equalization
from mmquant.quantize.gptq import Grid
from mmquant.quantize.int_grid import dequantize
from mmquant.quantize.learn import Schedule, Start, learn
from mmquant.quantize.rtn import rtn_int
from mmquant.quantize.transforms import overflow_cure, permute_channels, scale_pair

GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_learning_lowers_the_loss_and_never_ends_above_its_start() -> None:
    weight, mix = draw(24, 64), draw(10, 64)
    x, held = draw(600, 10) @ mix + 0.2 * draw(600, 64), draw(300, 10) @ mix + 0.2 * draw(300, 64)
    nearest = rtn_int(weight, 4, 32)
    start = Start(weight, nearest.scales)

    def loss(found: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return (F.relu(x @ found["w"].T) - F.relu(x @ weight.T)).square().mean()

    def judge(found: dict[str, torch.Tensor]) -> float:
        return float((F.relu(held @ found["w"].T) - F.relu(held @ weight.T)).square().mean())

    result = learn({"w": start}, loss, judge, Schedule(100, 0.01, 0.001))
    assert result.before == pytest.approx(judge({"w": dequantize(nearest)}), rel=1e-5)
    assert result.after < 0.8 * result.before
    assert judge({"w": dequantize(result.weights["w"])}) == pytest.approx(result.after, rel=1e-4)
    scales = result.weights["w"].scales
    assert torch.equal(scales, scales.bfloat16().float())
    worse = learn({"w": start}, lambda found, step: -loss(found, step), judge, Schedule(20, 0.05))
    assert worse.step == 0
    assert torch.equal(worse.weights["w"].codes, nearest.codes)


def test_equalization_lowers_the_error_and_is_exact_before_rounding() -> None:
    weight, loud = draw(3, 40, 64), torch.ones(64)
    loud[::9] = 12.0
    x = draw(3, 500, 64) * loud
    second = x.mT @ x / 500
    grid = Grid(4, 32, False)
    scale = search_equalization(weight, second, grid, shared=True)
    assert scale.shape == (64,)
    each = search_equalization(weight, second, grid, shared=False)
    assert each.shape == (3, 64)
    plain = torch.ones(64)
    errors = [
        output_error(weight, dequantize(round_scaled(weight, second, t, grid)) / t.unsqueeze(-2), second)
        for t in (plain, scale, each)
    ]
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert errors[2].sum() <= 1.02 * errors[1].sum()
    assert torch.allclose((weight * scale) @ (x / scale).mT, weight @ x.mT, rtol=1e-4, atol=1e-3)


def test_powers_of_two_and_orders_leave_an_expert_as_it_was() -> None:
    w1, w3, w2, x = draw(2, 10, 6), draw(2, 10, 6), draw(2, 6, 10), draw(2, 5, 6)

    def run(w1: torch.Tensor, w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT

    power = overflow_cure(torch.tensor([1e6, 60000.0]))
    assert power.tolist() == [6, 0]
    assert 1e6 * 2.0 ** -int(power[0]) * 4 <= 65504
    cured = scale_pair(w3, w2, power)
    assert torch.equal(run(w1, *cured), run(w1, w3, w2))
    order = torch.stack((torch.randperm(10, generator=GENERATOR), torch.arange(10)))
    assert torch.allclose(run(*permute_channels(w1, w3, w2, order)), run(w1, w3, w2), rtol=1e-4, atol=1e-5)
