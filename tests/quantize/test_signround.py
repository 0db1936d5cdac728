"""SignRound, AWQ scales and exact rewritings equal their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmquant.quantize.integer.awq import output_error, round_scaled, search_equalization
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import dequantize
from mmquant.quantize.integer.rtn import rtn_int
from mmquant.quantize.signround import (
    Start,
    StepSchedule,
    begin,
    grid_start,
    grid_weight,
    levels_of,
    move,
    scales_of,
    sign_round,
    values_of,
)

GENERATOR = torch.Generator().manual_seed(3)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_learning_lowers_the_loss_and_never_ends_above_its_start() -> None:
    weight, mix = draw(24, 64), draw(10, 64)
    x, held = draw(600, 10) @ mix + 0.2 * draw(600, 64), draw(300, 10) @ mix + 0.2 * draw(300, 64)
    nearest = rtn_int(weight, 4, 32)
    start = grid_start(weight, nearest)

    def loss(found: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return (F.relu(x @ found["w"].T) - F.relu(x @ weight.T)).square().mean()

    def judge(found: dict[str, torch.Tensor]) -> float:
        return float((F.relu(held @ found["w"].T) - F.relu(held @ weight.T)).square().mean())

    result = sign_round({"w": start}, loss, judge, StepSchedule(100, 0.01, 0.001))
    assert result.before == pytest.approx(judge({"w": dequantize(nearest)}), rel=1e-5)
    assert result.after < 0.8 * result.before
    assert judge({"w": dequantize(grid_weight(result.weights["w"], nearest))}) == pytest.approx(result.after, rel=1e-4)
    scales = result.weights["w"].scales
    assert torch.equal(scales, scales.bfloat16().float())
    worse = sign_round({"w": start}, lambda found, step: -loss(found, step), judge, StepSchedule(20, 0.05))
    assert worse.step == 0
    assert torch.equal(worse.weights["w"].levels, nearest.codes)


FORMATS = {
    "integers": None,
    "table": torch.tensor([-9.0, -4.0, -1.0, 0.0, 3.0]),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("rows", "groups", "size", "scales_move"), [(1, 1, 5, True), (3, 2, 16, False), (37, 3, 48, True)]
)
def test_the_kernels_move_what_the_definition_moves(
    form: str, rows: int, groups: int, size: int, scales_move: bool
) -> None:
    learn_triton = pytest.importorskip("mmquant.quantize.signround_triton", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = FORMATS[form]
    low, high = (-8.0, 7.0) if table is None else (float(table[0]), float(table[-1]))
    scales = draw(rows, groups) * 0.1
    position, grad = 5 * draw(rows, groups * size), draw(rows, groups * size)
    grad[:, 0], position[0, 0] = 0.0, 1e9
    start = Start(position, scales, low, high, table, scales_move)
    tensors = {name: value.to(device) for name, value in vars(start).items() if isinstance(value, torch.Tensor)}
    there = replace(start, **tensors)
    ours, state = begin(start), begin(there)
    for _ in range(3):
        move(start, ours, grad, 0.3, 0.01)
        learn_triton.move(there, state, grad.to(device), 0.3, 0.01)
    assert torch.allclose(state.position.cpu(), ours.position, atol=1e-6)
    assert (ours.gain is not None) == scales_move
    if ours.gain is not None and state.gain is not None:
        assert torch.allclose(state.gain.cpu(), ours.gain, atol=1e-6)
    found = learn_triton.rounded_values(there, state, scales_of(there, state), torch.float32).cpu()
    levels = levels_of(start, ours.position)
    assert torch.allclose(found, values_of(levels, scales_of(start, ours)), atol=1e-5)
    allowed = torch.arange(low, high + 1) if table is None else table
    nearest = (ours.position.double().unsqueeze(-1) - allowed).abs().amin(-1)
    assert torch.equal((ours.position.double() - levels).abs(), nearest)  # of two levels as near, either
    assert torch.isin(levels, allowed).all()


def test_one_step_goes_against_the_sign_of_the_gradient() -> None:
    scales, position, grad = draw(4, 3), 5 * draw(4, 24), draw(4, 24)
    grad[:, 0], position[0, 1] = 0.0, 100.0
    start = Start(position, scales, -8.0, 7.0, None, True)
    state = begin(start)
    move(start, state, grad, 0.3, 0.01)
    wanted = position - 0.3 * torch.sign(grad * scales.repeat_interleave(8, 1))
    inside = (position >= -8.5) & (position <= 7.5)
    assert torch.allclose(state.position, torch.where(inside, wanted, position))
    pull = (grad * levels_of(start, position)).view(4, 3, 8).sum(-1) * scales
    assert state.gain is not None
    assert torch.allclose(state.gain, 1 - 0.01 * pull.sign())


def test_equalization_lowers_the_error_and_is_exact_before_rounding() -> None:
    weight, loud = draw(3, 40, 64), torch.ones(64)
    loud[::9] = 12.0
    x = draw(3, 500, 64) * loud
    second = x.mT @ x / 500
    grid = GptqGrid(4, 32, False)
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
