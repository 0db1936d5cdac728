"""LDLQ into scalar grids: the objective's definition, ggml's own decoder, and a slow GPTQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmquant.quantize.ggml.codec import decode, encode, nearest, search, unpack, values
from mmquant.quantize.ggml.factor import DAMPING, factor_moments
from mmquant.quantize.ggml.scalar.grid import FORMS
from mmquant.quantize.ggml.scalar.ldlq import UnitFactor, encode_with_feedback, unit_factor
from mmquant.quantize.ggml.types import GGMLType

KINDS = list(FORMS)


def problem(experts: int, rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [E, R, n] and correlated mean moments [E, n, n]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(experts, n, n, generator=g) / n**0.5 + torch.eye(n)
    x = torch.randn(experts, 4 * n, n, generator=g) @ mix * torch.rand(n, generator=g).add(0.2)
    for expert in range(0, experts, 2):
        x[expert, :, : n // 2] *= 2  # super-blocks are processed in different orders
    return torch.randn(experts, rows, n, generator=g) * 0.05, x.mT @ x / (4 * n)


def factored(second: Tensor, damping: float = DAMPING) -> UnitFactor:
    return unit_factor(factor_moments(second, damping))


def loss(weight: Tensor, data: Tensor, kind: GGMLType, moments: Tensor) -> Tensor:
    """[E] tr(E H E^T)."""
    found = decode(data.flatten(0, 1), kind, weight.shape[-1]).view_as(weight)
    error = (weight - found).double()
    return ((error @ moments.double()) * error).sum((1, 2))


def plain(weight: Tensor, kind: GGMLType, moments: Tensor) -> Tensor:
    importance = moments.diagonal(dim1=1, dim2=2)
    return torch.stack([encode(w, kind, i.contiguous()) for w, i in zip(weight, importance, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_lowers_the_objective(kind: GGMLType) -> None:
    weight, moments = problem(2, 5, 512)
    known = factored(moments)
    damped = known_moments(known)
    before = loss(weight, plain(weight, kind, moments), kind, moments)
    swept, once, more = (encode_with_feedback(weight, kind, known, passes) for passes in (0, 1, 3))
    assert bool((loss(weight, swept, kind, moments) < 0.9 * before).all())
    losses = [loss(weight, data, kind, damped) for data in (swept, once, more)]
    assert bool((losses[1] < losses[0]).all())
    assert bool((losses[2] <= losses[1] * (1 + 1e-6)).all())


def known_moments(known: UnitFactor) -> Tensor:
    """The damped moments in the columns' own order."""
    back = known.columns.argsort(1)
    rows = known.moments.gather(1, back.unsqueeze(2).expand_as(known.moments))
    return rows.gather(2, back.unsqueeze(1).expand_as(rows))


def test_factor_is_ldl_of_the_damped_moments() -> None:
    _, moments = problem(3, 1, 512)
    known = factored(moments)
    assert torch.allclose(
        (known.lower * known.scale.unsqueeze(1)) @ known.lower.mT, known.moments, rtol=1e-4, atol=1e-5
    )
    ridge = DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1)
    expected = moments + ridge.view(-1, 1, 1) * torch.eye(512)
    assert torch.allclose(known_moments(known), expected, rtol=1e-4, atol=1e-5)
    energy = moments.diagonal(dim1=1, dim2=2).unflatten(1, (2, 256)).mean(2)
    assert torch.equal(known.order[:, -1], energy.argmax(1))  # the most energy goes first


def test_codes_are_those_of_gptq_column_by_column() -> None:
    """The textbook form (inverse Hessian, columns from first to last) on the mirrored problem, same frozen scales."""
    weight, moments = problem(1, 4, 256)
    known = factored(moments)
    data = encode_with_feedback(weight, GGMLType.Q4_K, known, passes=0)[0]
    grid, codes = unpack(data, GGMLType.Q4_K, 256)
    damped = known_moments(known)[0].double().flip(0, 1)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left = weight[0].double().flip(1)
    expected = torch.empty_like(codes)
    for j in range(256):
        column = 255 - j
        code = nearest(grid, column, left[:, j : j + 1].float())
        expected[:, column] = code[:, 0]
        error = (left[:, j] - values(grid, code, column)[:, 0].double()) / upper[j, j]
        left[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    assert (codes == expected).float().mean() > 0.995  # float32 ties


@pytest.mark.parametrize("n", [256, 512, 96])
def test_without_correlation_it_is_the_search(n: int) -> None:
    kind = GGMLType.Q4_K if n % 256 == 0 else GGMLType.Q5_1
    weight, _ = problem(2, 3, n)
    moments = torch.diag_embed(torch.rand(2, n).add(0.5))
    known = factored(moments, 0.0)
    found = encode_with_feedback(weight, kind, known, passes=0)
    assert torch.equal(found, plain(weight, kind, known_moments(known)))


@pytest.mark.parametrize("bad", [torch.zeros(256, 256), torch.full((256, 256), float("nan")), -torch.eye(256)])
def test_moments_without_a_factor_fall_back_to_rounding(bad: Tensor) -> None:
    weight, moments = problem(2, 3, 256)
    moments[1] = bad
    data = encode_with_feedback(weight, GGMLType.Q3_K, factored(moments))
    assert torch.isfinite(decode(data.flatten(0, 1), GGMLType.Q3_K, 256)).all()
    grid = search(weight[1], GGMLType.Q3_K)
    assert torch.equal(encode_with_feedback(weight, GGMLType.Q3_K, factored(moments), 0)[1, :, -2:], data_of(grid))


def data_of(grid) -> Tensor:  # type: ignore[no-untyped-def]
    return grid.d.contiguous().view(torch.uint8).view(-1, 2)


def test_dead_rows_and_columns() -> None:
    weight, moments = problem(1, 3, 256)
    weight[0, 1] = 0
    moments[0, 7] = 0
    moments[0, :, 7] = 0
    for kind in (GGMLType.Q2_K, GGMLType.Q6_K, GGMLType.IQ4_XS):
        found = decode(encode_with_feedback(weight, kind, factored(moments))[0], kind, 256)
        assert torch.isfinite(found).all()
        assert bool((found[1] == 0).all())


def test_moments_of_another_shape_are_refused() -> None:
    weight, _ = problem(2, 3, 512)
    with pytest.raises(ValueError, match="2 matrices of 512 columns"):
        encode_with_feedback(weight, GGMLType.Q4_K, factored(torch.eye(256).repeat(2, 1, 1)))
