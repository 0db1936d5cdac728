"""`combine` equals its definition, in torch and by the Triton kernel."""

from __future__ import annotations

import pytest
import torch

from mmquant.calibration.model.combine import combine, launch


def by_loops(y: torch.Tensor, place: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(place.shape[0], y.shape[1], dtype=torch.float64)
    for token in range(place.shape[0]):
        for k in range(place.shape[1]):
            out[token] += router_weight[token, k].double() * y[place[token, k]].double()
    return out.float()


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (4, 2, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [False, True])
def test_combine_is_the_weighted_sum(shape: tuple[int, int, int], dtype: torch.dtype, kernel: bool) -> None:
    tokens, per_token, hidden = shape
    generator = torch.Generator().manual_seed(tokens)
    y = torch.randn(tokens * per_token, hidden, generator=generator).to(dtype)
    place = torch.randperm(tokens * per_token, generator=generator).view(tokens, per_token)
    router_weight = torch.rand(tokens, per_token, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = (launch if kernel else combine)(y.to(device), place.to(device), router_weight.to(device)).cpu()
    assert torch.allclose(found, by_loops(y, place, router_weight), atol=1e-5)
