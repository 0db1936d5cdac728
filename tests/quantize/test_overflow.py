"""Overflow rescaling: which experts, by how much, and that the function stays the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmquant.quantize.overflow import AT_RISK, TARGET, rescale_exponents, scale_pair


def test_exponents_only_where_float16_is_near() -> None:
    largest = torch.tensor([0.0, 3e4, 4e4, 65504.0, 3e5, 1e6])
    found = rescale_exponents(largest)
    assert found.tolist() == [0, 0, 2, 2, 5, 6]
    assert bool((largest / torch.exp2(found) <= AT_RISK).all())
    assert bool((largest / torch.exp2(found) <= TARGET)[found > 0].all())
    assert bool((largest / torch.exp2(found - 1) > TARGET)[found > 0].all())  # and no more than is needed


def test_powers_of_two_leave_an_expert_as_it_was() -> None:
    generator = torch.Generator().manual_seed(3)
    w1, w3, w2 = (torch.randn(shape, generator=generator) for shape in ((2, 10, 6), (2, 10, 6), (2, 6, 10)))
    x = torch.randn(2, 5, 6, generator=generator)

    def run(w3: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return (F.silu(x @ w1.mT) * (x @ w3.mT)) @ w2.mT

    assert torch.equal(run(*scale_pair(w3, w2, rescale_exponents(torch.tensor([1e6, 60.0])))), run(w3, w2))
