"""The affine grid: its search against brute force and its definition, awkward groups, error feedback and descent."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmquant.errors import InputError
from mmquant.quantize.affine.grid import BITS, AffineGrid, search_panel, search_panel_torch
from mmquant.quantize.integer.descent import descend
from mmquant.quantize.integer.gptq import gptq_quantize
from mmquant.quantize.integer.grid import dequantize


def error(part: Tensor, h: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
    """[E, O] in float64, by the definition."""
    x, s, b = part.double(), scale.double().unsqueeze(1), bias.double().unsqueeze(1)
    code = ((x - b) / s).round().clamp(0, 2**bits - 1)
    return (h.double().unsqueeze(-1) * (x - s * code - b).square()).sum(1)


def example(seed: int, experts: int, columns: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn(experts, columns, outputs, generator=generator) * 0.02 + 0.004
    return part, torch.rand(experts, columns, generator=generator) ** 2 + 0.01


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(BITS), st.sampled_from([32, 64]), st.integers(1, 35))
def test_the_kernel_finds_what_the_definition_finds(seed: int, bits: int, columns: int, outputs: int) -> None:
    part, h = example(seed, 2, columns, outputs)
    scale, bias = search_panel(part, h, bits)
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(bias, bias.bfloat16().float())
    expected = error(part, h, *search_panel_torch(part, h, bits), bits)
    worse = error(part, h, scale, bias, bits) / expected - 1
    assert float(worse.max()) < (0.05 if bits < 6 else 0.4)  # five sums in float32 against differences
    assert float(worse.mean()) < 0.03


def test_each_group_of_each_matrix_has_its_own_scale_and_bias() -> None:
    """Groups whose ranges lie far apart: with a neighbour's scale or bias, or another matrix's weights, all is off."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 5, 96, generator=generator) * 0.02
    for expert in range(2):
        for group in range(3):
            weight[expert, :, 32 * group : 32 * group + 32] += 3.0 * expert - 5.0 * group
    h = torch.rand(2, 96, generator=generator) ** 4 + 0.001
    found = AffineGrid(4, 32).round_nearest(weight, h)
    assert found.biases is not None
    for group in range(3):
        columns = slice(32 * group, 32 * group + 32)
        part, own = weight[:, :, columns].mT.contiguous(), h[:, columns]
        expected = error(part, own, *search_panel_torch(part, own, 4), 4)
        off = (weight[:, :, columns] - dequantize(found)[:, :, columns]).double()
        assert float(((own.double().unsqueeze(1) * off.square()).sum(-1) / expected).max()) < 1.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_near_the_best_of_all_ranges(bits: int) -> None:
    """Brute force over 40 x 40 ranges: the search is within 6 %, the range of the extremes far from it."""
    part, h = example(1, 1, 32, 24)
    least, most = part.amin(1), part.amax(1)
    best = torch.full_like(least, torch.inf, dtype=torch.float64)
    for below in torch.linspace(0, 0.45, 40):
        for above in torch.linspace(0, 0.45, 40):
            low, high = least + below * (most - least), most - above * (most - least)
            best = torch.minimum(best, error(part, h, (high - low) / (2**bits - 1), low, bits))
    found = error(part, h, *search_panel(part, h, bits), bits)
    extremes = error(part, h, (most - least) / (2**bits - 1), least, bits)
    assert float(found.sum() / best.sum()) < 1.06
    assert float(extremes.sum() / found.sum()) > 1.15


@pytest.mark.parametrize("values", [0.0, 0.0371, -3e-5, 1e4])
def test_flat_groups(values: float) -> None:
    """A group of one value has no scale; it is read back to a bfloat16."""
    found = AffineGrid(4, 32).round_nearest(torch.full((1, 3, 64), values), None)
    back = dequantize(found)
    assert float((back - values).abs().max()) <= abs(values) * 2**-8
    assert bool((found.scales != 0).all())


def test_one_outlier_and_signs() -> None:
    """A group of positive weights far from zero keeps its resolution: the bias takes what they share."""
    weight = 5 + 0.01 * torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2))
    found = AffineGrid(4, 64).round_nearest(weight, None)
    assert float((dequantize(found) - weight).abs().max()) < 0.03
    assert float(found.biases.min()) > 4.5  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_err_less_and_feedback_errs_less_still(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(2, 20, 128, generator=generator) * 0.02
    rows = torch.randn(2, 256, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    second = rows.mT @ rows / 256
    grid = AffineGrid(bits, 32)

    def loss(values: Tensor) -> float:
        off = weight - values
        return float(((off @ second) * off).sum())

    nearest = loss(dequantize(grid.round_nearest(weight, second.diagonal(dim1=-2, dim2=-1).contiguous())))
    fed = gptq_quantize(weight, second, grid)
    again = descend(weight, fed, second, grid)
    assert loss(dequantize(fed.weight)) < 0.9 * nearest
    assert loss(dequantize(again.weight)) <= loss(dequantize(fed.weight)) * (1 + 1e-3)
    assert again.weight.biases is not None
    assert torch.equal(again.weight.biases, again.weight.biases.bfloat16().float())
    low, high = int(fed.weight.codes.min()), int(fed.weight.codes.max())
    assert -(1 << (bits - 1)) <= low < high <= (1 << (bits - 1)) - 1


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide 48 inputs"):
        AffineGrid(4, 32).round_nearest(torch.ones(1, 2, 48), None)
    with pytest.raises(InputError, match="NaN or infinity"):
        AffineGrid(4, 32).round_nearest(torch.full((1, 2, 32), torch.nan), None)


def test_values_are_codes_scales_and_biases() -> None:
    """The lowest code is the bias, one code more is one scale more."""
    found = AffineGrid(2, 32).round_nearest(torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(5)), None)
    for code in range(4):
        one = dataclasses.replace(found, codes=torch.full_like(found.codes, code - 2))
        assert found.biases is not None
        assert torch.equal(dequantize(one), (code * found.scales + found.biases).expand(-1, -1, 32))
