"""AWQ's search against brute force: which of the tried scales costs the outputs least, for one expert and for all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmquant.quantize.integer.awq import LARGEST, TRIES, candidates, output_error, round_scaled, search_equalization
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import dequantize

GROUP = 16
GRID = GptqGrid(4, GROUP, True)


def made(seed: int, experts: int = 3, outputs: int = 8, n: int = 32) -> tuple[Tensor, Tensor]:
    """Unequal experts whose inputs have channels of very unequal size, and correlate."""
    source = torch.Generator().manual_seed(seed)
    loud = torch.exp(1.5 * torch.randn(experts, 1, n, generator=source))
    rows = torch.randn(experts, 4 * n, n, generator=source) * loud
    rows = rows + rows.roll(1, -1)
    weight = torch.randn(experts, outputs, n, generator=source) * torch.tensor([0.3, 1.0, 2.0])[:, None, None]
    return weight, rows.mT @ rows / rows.shape[1]


def errors(weight: Tensor, second: Tensor, shared: bool) -> Tensor:
    """[tried, E], by the definition, a row of outputs at a time in float64."""
    found = []
    for scale in candidates(weight, second.diagonal(dim1=-2, dim2=-1), shared, GROUP):
        values = dequantize(round_scaled(weight, second, scale, GRID, TRIES)) / scale.unsqueeze(-2)
        wrong = (weight - values).double()
        found.append([sum(float(row @ h.double() @ row) for row in w) for w, h in zip(wrong, second, strict=True)])
    return torch.tensor(found)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, second = made(0)
    values = weight.round()
    wanted = [
        sum(float(row @ h.double() @ row) for row in w) for w, h in zip((weight - values).double(), second, strict=True)
    ]
    assert torch.allclose(output_error(weight, values, second).double(), torch.tensor(wanted).double(), rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_tried_changes_no_size_on_the_whole(shared: bool) -> None:
    weight, second = made(1)
    tried = candidates(weight, second.diagonal(dim1=-2, dim2=-1), shared, GROUP)
    assert torch.equal(tried[0], torch.ones_like(tried[0]))
    assert {scale.shape for scale in tried} == {(32,) if shared else (3, 32)}
    for scale in tried:
        assert 1 / LARGEST <= float(scale.min()) <= float(scale.max()) <= LARGEST
        if float(scale.max()) < LARGEST and float(scale.min()) > 1 / LARGEST:
            assert torch.allclose(scale.log().mean(-1), torch.zeros(()), atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_each_expert_gets_its_own_best(seed: int) -> None:
    weight, second = made(seed)
    best = errors(weight, second, shared=False).argmin(0)
    tried = torch.stack(candidates(weight, second.diagonal(dim1=-2, dim2=-1), False, GROUP))
    assert len(set(best.tolist())) > 1, "experts that agree prove nothing"
    assert torch.equal(search_equalization(weight, second, GRID, False), tried[best, torch.arange(3)])


@pytest.mark.parametrize("seed", [2, 3, 5, 6])
def test_all_share_what_is_best_for_their_sum(seed: int) -> None:
    weight, second = made(seed)
    found = errors(weight, second, shared=True)
    assert found.sum(1).argmin() != found.amax(1).argmin(), "the largest expert alone would choose another"
    tried = candidates(weight, second.diagonal(dim1=-2, dim2=-1), True, GROUP)
    assert torch.equal(search_equalization(weight, second, GRID, True), tried[int(found.sum(1).argmin())])
