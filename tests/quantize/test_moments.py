"""Shrinkage of an expert's moments towards the layer's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmquant.quantize.moments import Moments, check_moments, shrinkage, shrunk, shrunk_diagonal


def moments(rows: list[int], n: int = 12, seed: int = 0, scale: float = 1.0) -> Moments:
    """Sums over rows[e] weighted random rows of expert e; the last expert's inputs are `scale` times larger."""
    generator = torch.Generator().manual_seed(seed)
    second, weight, plain = [], [], []
    for e, count in enumerate(rows):
        x = torch.randn(count, n, generator=generator) * (scale if e == len(rows) - 1 else 1.0)
        s = torch.rand(count, 1, generator=generator)
        second.append((s * x).T @ (s * x))
        weight.append((s**2).sum())
        plain.append((x**2).sum(0))
    stack, zero = torch.stack(second), torch.zeros(len(rows))
    diagonal = stack.diagonal(dim1=-2, dim2=-1).clone()
    return Moments(
        torch.tensor(rows).float(), torch.stack(weight), stack, diagonal, torch.stack(plain), zero, zero, zero, zero
    )


def test_many_rows_keep_their_own_and_no_rows_take_the_pool() -> None:
    found = moments([100_000, 30, 0])
    share = shrinkage(found, 0.5)
    assert share[0] < 1e-3
    assert 0.1 < share[1] < 0.3  # k is 6 rows of 12 inputs
    assert share[2] == 1.0
    blended = shrunk(found, 0.5)
    assert found.second is not None
    assert torch.allclose(blended[0], found.second[0] / found.weight[0], atol=1e-2)
    assert torch.isfinite(blended).all()
    assert blended[2].diagonal().mean() == pytest.approx(1.0, rel=0.2)


def test_the_rule_is_the_stated_one() -> None:
    found = moments([50, 20, 8])
    assert found.second is not None
    k = 0.7 * 12 * found.weight.sum() / found.count.sum()
    energy = found.diagonal.mean(-1) / found.weight
    pool = (found.second / energy[:, None, None]).sum(0) / found.weight.sum()
    for e in range(3):
        expected = (found.second[e] + k * pool * energy[e]) / (found.weight[e] + k)
        assert torch.allclose(shrunk(found, 0.7)[e], expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(shrunk_diagonal(found, 0.7), shrunk(found, 0.7).diagonal(dim1=-2, dim2=-1), rtol=1e-5)
    assert torch.equal(shrunk(found, 0.7, slice(1, 3)), shrunk(found, 0.7)[1:3])


def test_an_expert_with_huge_inputs_does_not_drown_the_others() -> None:
    calm, loud = moments([40, 40, 40]), moments([40, 40, 40], scale=4096.0)
    assert torch.allclose(shrunk(calm, 1.0)[0], shrunk(loud, 1.0)[0], rtol=1e-4, atol=1e-5)


def test_missing_foreign_and_broken_moments_are_refused() -> None:
    found = moments([40, 40])
    with pytest.raises(ValueError, match="expected full second moments"):
        shrunk(dataclasses.replace(found, second=None), 1.0)
    with pytest.raises(ValueError, match=r"layer 3 w2: moments of 2 matrices with 12 inputs, expected 4 with 12"):
        check_moments(found, 4, 12, "layer 3 w2")
    broken = dataclasses.replace(found, diagonal=found.diagonal * float("nan"))
    with pytest.raises(ValueError, match="diagonal of the moments holds NaN or infinity"):
        check_moments(broken, 2, 12, "layer 3 w2")
    with pytest.raises(ValueError, match="no calibration row reached"):
        check_moments(moments([0, 0]), 2, 12, "layer 3 w2")
