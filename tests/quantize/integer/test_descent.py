"""Block coordinate descent: never worse in any row, exact bookkeeping, on every grid with symmetric codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmquant.quantize.fp4.grid import MXFP4, NVFP4
from mmquant.quantize.integer.descent import descend
from mmquant.quantize.integer.gptq import DAMPING, gptq_quantize
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import IntWeight, dequantize
from mmquant.quantize.integer.panel import Grid

GRIDS = {"nvfp4": NVFP4, "mxfp4": MXFP4, "int4": GptqGrid(4, 32)}


def layer(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(experts, outputs, inputs, generator=generator) * 0.02
    x = torch.randn(experts, 2 * inputs, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return weight, x.mT @ x / x.shape[1]


def rows(weight: Tensor, found: IntWeight, second: Tensor) -> Tensor:
    """[E, O] what GPTQ minimises, in double precision."""
    second = second.double()
    damping = DAMPING * second.diagonal(dim1=-2, dim2=-1).mean(-1)
    error = weight.double() - dequantize(found).double()
    return ((error @ second) * error).sum(-1) + damping.unsqueeze(-1) * error.square().sum(-1)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("experts", "outputs", "inputs"), [(2, 19, 160), (1, 1, 32), (3, 16, 256)])
def test_no_row_gets_worse(grid: Grid, experts: int, outputs: int, inputs: int) -> None:
    weight, second = layer(experts, outputs, inputs)
    first = gptq_quantize(weight, second, grid, keep=True)
    kept = second.clone()
    one = descend(weight, replace(first, compensated=None), second, grid, passes=1)
    two = descend(weight, first, second, grid, passes=2)
    assert torch.equal(second, kept)
    before, after, last = (rows(weight, found.weight, second) for found in (first, one, two))
    assert two.compensated is not None  # still what is rounded to the codes
    scaled = torch.unflatten(two.compensated, -1, (two.weight.scales.shape[-1], -1)) / two.weight.scales.unsqueeze(-1)
    off = (scaled.flatten(-2) - two.weight.codes).abs()
    assert float((off <= torch.where(two.weight.codes.abs() < 4, 0.51, 2.1)).float().mean()) > 0.97
    assert bool((after <= before * (1 + 1e-5) + 1e-12).all())
    assert bool((last <= after * (1 + 1e-5) + 1e-12).all())
    if inputs > 64:
        assert float(last.sum()) < 0.95 * float(before.sum())


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_independent_inputs_leave_nothing_to_gain(grid: Grid) -> None:
    """With uncorrelated inputs each block is at its best already: only the choice of scales may change."""
    weight, _ = layer(1, 12, 128)
    second = torch.eye(128).expand(1, -1, -1).contiguous()
    first = gptq_quantize(weight, second, grid)
    found = descend(weight, first, second, grid)
    assert float((rows(weight, found.weight, second) / rows(weight, first.weight, second)).mean()) > 0.97
