"""FP4 grids: the scale of least error by brute force, error feedback by a slow loop, and what can be stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmquant.errors import InputError
from mmquant.quantize.fp4.grid import LARGEST_SCALE, LEAST_SCALE, MXFP4, NVFP4, Fp4Grid
from mmquant.quantize.fp4.levels import LEVELS, nearest
from mmquant.quantize.integer.gptq import Feedback, gptq_factor, gptq_quantize
from mmquant.quantize.integer.grid import IntWeight, dequantize, join_weights, rows_of, search_weights, select

GRIDS = pytest.mark.parametrize("grid", [NVFP4, MXFP4], ids=["nvfp4", "mxfp4"])
E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def weights(experts: int, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Heavy tails, blocks of very different size, a block of zeros and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(experts, outputs, inputs, generator=generator) * 0.02
    found *= torch.exp(torch.randn(experts, outputs, 1, generator=generator))
    found[..., ::37] *= 8
    found[:, 0, :32] = 0
    found[:, -1] = 0
    return found


def moments(experts: int, inputs: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(experts, 3 * inputs, inputs, generator=generator) * torch.linspace(0.2, 3, inputs)
    x[..., 1:] += 0.6 * x[..., :-1]
    return x.mT @ x / x.shape[1]


def stored(grid: Fp4Grid) -> Tensor:
    """Every scale that a block may have, up to a power of two."""
    return E4M3 if grid is NVFP4 else torch.exp2(torch.arange(-40, 20).double())


def squared(values: Tensor, scale: Tensor, weighing: Tensor) -> Tensor:
    """Weighted squared error of blocks [N, g] under scales [N], in double precision, by the definition."""
    table = torch.tensor(LEVELS, dtype=torch.float64) / 2
    distance = (values.unsqueeze(-1) / scale.view(-1, 1, 1) - table).abs()
    rounded = table[distance.argmin(-1)] * scale.unsqueeze(-1)
    return ((values - rounded).square() * weighing).sum(-1)


@GRIDS
@pytest.mark.parametrize("weighed", [False, True])
def test_no_stored_scale_is_better(grid: Fp4Grid, weighed: bool) -> None:
    """All scales that a block can have are tried here; the ones that the search leaves out are no better."""
    found = weights(2, 21, 64)
    importance = torch.rand(2, 64, generator=torch.Generator().manual_seed(5)) if weighed else None
    result = grid.round_nearest(found, importance)
    size = grid.group_size
    spread = torch.ones(2, 64) if importance is None else importance
    for expert in range(2):
        weighing = search_weights(spread[expert].unflatten(-1, (-1, size))).double()  # [G, g]
        blocks = found[expert].unflatten(-1, (-1, size)).double()  # [O, G, g]
        ours = result.scales[expert].double() * 2
        for group in range(64 // size):
            part, h = blocks[:, group], weighing[group]
            best = torch.full((len(part),), math.inf, dtype=torch.float64)
            unit = torch.ones(1) if result.unit is None else result.unit[expert, 0].double()
            for scale in (stored(grid) * unit).tolist():
                best = torch.minimum(best, squared(part, torch.full((len(part),), scale, dtype=torch.float64), h))
            mine = squared(part, ours[:, group], h)
            energy = (part.square() * h).sum(-1)
            live = result.codes[expert].unflatten(-1, (-1, size))[:, group].any(-1)
            assert bool((mine <= best * (1 + 1e-5) + 1e-9 * energy)[live].all())


@GRIDS
def test_codes_are_the_nearest_under_their_scale(grid: Fp4Grid) -> None:
    found = weights(2, 33, 96)
    result = grid.round_nearest(found, None)
    wanted = nearest(found.unflatten(-1, (-1, grid.group_size)) / result.scales.unsqueeze(-1)).flatten(-2)
    assert float((result.codes != wanted).float().mean()) < 1e-3  # halfway between two


@GRIDS
@pytest.mark.parametrize(("experts", "outputs", "inputs"), [(1, 1, 32), (3, 37, 160), (2, 16, 384), (5, 3, 96)])
def test_what_comes_out_can_be_stored(grid: Fp4Grid, experts: int, outputs: int, inputs: int) -> None:
    found = weights(experts, outputs + 1, inputs, outputs)
    found[0, 0, 0] = 3e4  # most other blocks are beyond E4M3's range below it
    second = moments(experts, inputs)
    for result in (grid.round_nearest(found, None), gptq_quantize(found, second, grid).weight):
        assert set(result.codes.unique().tolist()) <= set(LEVELS)
        values = dequantize(result)
        assert torch.isfinite(values).all()
        assert torch.equal(values, values.bfloat16().float())  # exact in bfloat16
        assert bool((values[:, -1] == 0).all())
        full = 2 * result.scales
        if grid is MXFP4:
            assert torch.equal(torch.exp2(torch.log2(full).round()), full)
            continue
        assert result.unit is not None
        assert bool((result.unit == result.unit[:, :1]).all())
        mantissa, _ = torch.frexp(result.unit)
        assert bool((mantissa == 0.5).all())
        block = full / result.unit
        assert torch.equal(block.to(torch.float8_e4m3fn).float(), block)
        top = block.amax((1, 2))
        assert bool(((top > LARGEST_SCALE / 2) & (top <= LARGEST_SCALE)).all())
        live = result.codes.unflatten(-1, (-1, 16)).any(-1)
        assert bool((block[live] >= LEAST_SCALE).all())


def test_blocks_below_the_range_are_rounded_again() -> None:
    """Their scale is raised to the least that every kernel reads; codes are the nearest under it, most of them zero."""
    weight = torch.full((1, 1, 48), 2.0**-19)
    weight[..., :16] = 1.0
    weight[..., 32] = 2.0**-8
    weight[..., 33] = -(2.0**-13) * 1.3
    found = NVFP4.round_nearest(weight, None)
    assert found.unit is not None
    least = float(found.unit[0, 0, 0]) * LEAST_SCALE
    assert float(found.scales[0, 0, 1]) * 2 == least
    codes = found.codes[0, 0].unflatten(-1, (-1, 16))
    half = found.scales[0, 0].unsqueeze(-1)
    wanted = nearest(weight[0, 0].unflatten(-1, (-1, 16)) / half)
    assert torch.equal(codes.float(), wanted)
    assert not bool(codes[1].any())


def slow_feedback(weight: Tensor, known: Feedback, scales: Tensor, size: int) -> Tensor:
    """Values [O, I] of one matrix: a column takes the errors of those behind it in the order, in double precision."""
    order, lower = known.order[0], known.lower[0].double()
    columns, table = weight[:, order].double(), torch.tensor(LEVELS, dtype=torch.float64)
    errors, values = torch.zeros_like(columns), torch.zeros_like(columns)
    for k in range(len(order) - 1, -1, -1):
        wanted = columns[:, k] + errors[:, k + 1 :] @ lower[k + 1 :, k]
        scale = scales[:, order[k] // size].double()
        level = table[((wanted / scale).unsqueeze(-1) - table).abs().argmin(-1)]
        values[:, k] = level * scale
        errors[:, k] = columns[:, k] - values[:, k]
    return values[:, order.argsort()]


@GRIDS
@pytest.mark.parametrize(("outputs", "inputs"), [(19, 160), (16, 256), (5, 32)])
def test_errors_are_fed_back_as_by_the_definition(grid: Fp4Grid, outputs: int, inputs: int) -> None:
    weight, second = weights(1, outputs, inputs, inputs)[:, 1:-1], moments(1, inputs)
    solved = gptq_quantize(weight, second, grid, keep=True)
    known = gptq_factor(second, grid.group_size)
    wanted = slow_feedback(weight[0], known, solved.weight.scales[0], grid.group_size)
    got = dequantize(solved.weight)[0].double()
    same = ((got - wanted).abs() < 1e-6).all(-1)
    assert float(same.float().mean()) >= 0.7  # the others had a code halfway between two
    assert float((got - wanted).norm() / wanted.norm()) < 0.06
    again = gptq_quantize(weight, second, grid, scales=solved.weight.scales).weight
    assert float((again.codes != solved.weight.codes).float().mean()) < 0.01


@GRIDS
def test_no_stored_scale_is_better_with_errors_fed_back(grid: Fp4Grid) -> None:
    """One group: every scale that it can have, swept by the slow loop; judged by tr(E H E^T), H as it is damped."""
    size = grid.group_size
    weight, second = weights(1, 12, 32, 3)[:, 1:-1, :size], moments(1, size)
    known = gptq_factor(second, size)
    damped = second[0].double() + torch.eye(size) * float(known.damping[0] * second[0].diagonal().mean())

    def cost(values: Tensor) -> Tensor:
        error = weight[0].double() - values
        return ((error @ damped) * error).sum(-1)

    best = torch.full((weight.shape[1],), math.inf, dtype=torch.float64)
    found = gptq_quantize(weight, second, grid).weight
    unit = torch.ones(1) if found.unit is None else found.unit[0, 0].double()
    for scale in (stored(grid) * unit / 2).tolist():
        fixed = torch.full((weight.shape[1], 1), scale)
        best = torch.minimum(best, cost(slow_feedback(weight[0], known, fixed, size)))
    mine = cost(dequantize(found)[0].double())
    assert float((mine / best).mean()) < 1.02
    assert float((mine <= best * 1.001).float().mean()) >= 0.8  # a little is added to columns of no energy


def loss(weight: Tensor, found: IntWeight, second: Tensor) -> float:
    error = weight - dequantize(found)
    return float(((error @ second) * error).sum())


@GRIDS
def test_each_step_lowers_the_error_of_the_outputs(grid: Fp4Grid) -> None:
    weight, second = weights(3, 48, 256), moments(3, 256)
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    plain, weighed = (loss(weight, grid.round_nearest(weight, h), second) for h in (None, diagonal))
    fed = loss(weight, gptq_quantize(weight, second, grid).weight, second)
    assert fed < 0.75 * weighed
    assert weighed < plain


def test_matrices_of_a_stack_share_a_unit() -> None:
    w1, w3 = weights(2, 20, 64, 1), 50 * weights(2, 20, 64, 2)
    result = NVFP4.round_nearest(torch.cat((w1, w3), 1), None)
    first, second = rows_of(result, slice(0, 20)), rows_of(result, slice(20, None))
    assert first.unit is not None
    assert second.unit is not None
    assert torch.equal(first.unit, second.unit)
    assert torch.equal(dequantize(join_weights([result, result]))[2:], dequantize(result))
    assert torch.equal(dequantize(select(result, 1)), dequantize(result)[1])


@GRIDS
def test_bad_input(grid: Fp4Grid) -> None:
    weight = weights(1, 4, 64)
    with pytest.raises(InputError, match="does not divide 40 inputs"):
        grid.round_nearest(weight[..., :40], None)
    weight[0, 1, 3] = math.nan
    with pytest.raises(InputError, match="holds NaN or infinity"):
        grid.round_nearest(weight, None)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        gptq_quantize(weight, moments(1, 64), grid)
