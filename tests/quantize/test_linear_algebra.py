"""Factors and division against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmquant.calibration.gguf.moments import corrected
from mmquant.quantize import linear_algebra
from mmquant.quantize.ggml.factor import factor_moments
from mmquant.quantize.linear_algebra import BLOCK, damped_cholesky, divide


def moments(experts: int, n: int) -> Tensor:
    x = torch.randn(experts, 2 * n, n, generator=torch.Generator().manual_seed(n))
    return x.mT @ x / (2 * n) + 0.05 * torch.eye(n)


@pytest.mark.parametrize(("experts", "rows", "n"), [(2, 5, 3 * BLOCK), (1, 1, BLOCK), (3, 130, 2 * BLOCK)])
def test_division_by_blocks(experts: int, rows: int, n: int) -> None:
    """What CUDA does, and what the library does, beside float64."""
    second = moments(experts, n)
    lower = torch.linalg.cholesky(second)
    right = torch.randn(experts, rows, n, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.solve(second.double(), right.double().mT).mT
    for found in (linear_algebra._divided(right.clone(), lower), divide(right, lower)):
        assert float((found - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("n", [3 * BLOCK, 3 * BLOCK + 32])
def test_division_on_a_gpu(n: int) -> None:
    second, right = moments(2, n), torch.randn(2, 70, n)
    exact = torch.linalg.solve(second.double(), right.double().mT).mT
    found = divide(right.cuda(), torch.linalg.cholesky(second).cuda()).cpu()
    assert float((found - exact).norm() / exact.norm()) < 1e-5


def test_more_damping_where_it_is_needed_and_none_without_energy() -> None:
    second = moments(4, 8)
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    second[1] -= 0.3 * mean[1] * torch.eye(8)  # not definite at the damping asked for
    second[2] = 0
    second[3, 1, 2] = float("nan")
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    lower, added = damped_cholesky(second, mean, 0.05)
    assert added.tolist() == [1, 10, 0, 0]
    for expert in (0, 1):
        damped = second[expert] + added[expert] * 0.05 * mean[expert] * torch.eye(8)
        assert torch.allclose(lower[expert] @ lower[expert].mT, damped, atol=1e-5)
    assert torch.equal(lower[2:], torch.eye(8).expand(2, 8, 8))


def test_a_factor_divides_in_the_columns_own_order() -> None:
    second = moments(2, 512)
    second[0, :256] *= 3
    second[0, :, :256] *= 3
    known = factor_moments(second, 0.1)
    assert known.order[0].tolist() == [1, 0]
    ridge = 0.1 * second.diagonal(dim1=1, dim2=2).mean(1)
    damped = second.double() + ridge.double().view(-1, 1, 1) * torch.eye(512)
    right = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.solve(damped, right.double().mT).mT
    assert float((known.divide(right) - exact).norm() / exact.norm()) < 1e-5
    assert bool(known.good.all())


def test_a_factor_is_of_the_moments_beside_it_however_much_damping_they_took() -> None:
    """Both in processing order; only what took the damping asked for is good, and the rest is corrected by nothing."""
    second = moments(4, 512)
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    second[1] -= 0.3 * mean[1] * torch.eye(512)  # not definite at the damping asked for
    second[2] = 0
    second[3, 1, 2] = float("inf")
    mean = second.diagonal(dim1=1, dim2=2).mean(1)
    known = factor_moments(second, 0.05)
    assert known.good.tolist() == [True, False, False, False]
    for expert, times in ((0, 1), (1, 10)):
        columns = known.columns[expert]
        damped = second[expert] + times * 0.05 * mean[expert] * torch.eye(512)
        assert torch.allclose(known.moments[expert], damped[columns][:, columns], atol=1e-6)
    assert torch.allclose(known.lower @ known.lower.mT, known.moments, atol=1e-5)
    assert torch.equal(known.moments[2:], torch.eye(512).expand(2, 512, 512))
    weight, cross = (
        torch.randn(4, 3, 512, generator=torch.Generator().manual_seed(2)),
        0.9 * second.nan_to_num(posinf=0.0),
    )
    better = corrected(weight, second, cross, known)
    assert [torch.equal(*pair) for pair in zip(better, weight, strict=True)] == [False, True, True, True]
