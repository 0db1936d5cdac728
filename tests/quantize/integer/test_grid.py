"""Integer grids and packings equal their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmquant.quantize.integer import grid as int_grid
from mmquant.quantize.integer.grid import bfloat16_exact, dequantize, round_to_codes, search_scales
from mmquant.quantize.integer.pack import (
    AWQ_ORDER,
    pack_awq,
    pack_gptq,
    pack_gptq_zeros,
    pack_rows,
    pack_zeros_ct,
    unpack_awq,
    unpack_gptq,
    unpack_gptq_zeros,
    unpack_rows,
    unpack_zeros_ct,
)
from mmquant.quantize.integer.rtn import rtn_int


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 12), st.sampled_from([32, 96]), st.booleans(), st.integers(0, 999))
def test_the_scale_is_near_the_best_of_a_fine_scan(rows: int, group: int, weighted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, group, generator=generator)
    importance = torch.rand(group, generator=generator) + 0.1 if weighted else torch.ones(group)
    scales, zeros = search_scales(weight, importance if weighted else None, 4, -1)
    assert zeros is None
    found = ((weight - dequantize(round_to_codes(weight, scales, None, 4))).square() * importance).sum(-1)
    best = torch.full((rows,), torch.inf)
    extreme = weight.abs().amax(-1, keepdim=True)
    for ratio in torch.linspace(0.4, 1.4, 300):
        for sign in (1, -1):
            fine = bfloat16_exact(sign * ratio * extreme / 8)
            codes = (weight / fine).round().clamp(-8, 7)
            best = torch.minimum(best, ((weight - codes * fine).square() * importance).sum(-1))
    assert found.sum() <= 1.05 * best.sum()


def test_signed_scales_put_the_extreme_at_minus_eight() -> None:
    weight = torch.tensor([[8.0, -3.0, 1.0, 5.0], [-8.0, 3.0, -1.0, -5.0]])
    exact = rtn_int(weight, 4, -1)
    assert torch.equal(dequantize(exact), weight)
    assert exact.scales.flatten().tolist() == [-1.0, 1.0]
    unsigned = rtn_int(weight, 4, -1, signed=False)
    assert (unsigned.scales > 0).all()
    assert not torch.equal(dequantize(unsigned)[0], weight[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_tiny_and_constant_groups(symmetric: bool) -> None:
    weight = torch.stack((torch.zeros(32), torch.full((32,), 3e-30), torch.full((32,), 0.5), torch.full((32,), -2.0)))
    found = rtn_int(weight, 4, 16, symmetric)
    assert torch.isfinite(found.scales).all()
    assert (found.scales != 0).all()
    assert torch.allclose(dequantize(found), weight, rtol=0.01)


def test_zero_points_help_groups_off_centre() -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) * 2 + 0.2
    errors = [(dequantize(rtn_int(weight, 4, 32, s)) - weight).square().mean() for s in (True, False)]
    assert errors[1] < 0.5 * errors[0]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        rtn_int(torch.tensor([[float("nan"), 1.0]]), 4, -1)


@pytest.mark.parametrize("symmetric, signed", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("experts, rows, group", [(1, 1, 7), (3, 5, 40), (2, 33, 128)])
def test_processor_and_graphics_card_search_alike(
    symmetric: bool, signed: bool, experts: int, rows: int, group: int
) -> None:
    """The numba search against the torch operations that CUDA runs, each expert with its own importance."""
    weight = torch.randn(experts, rows, 3 * group, generator=torch.Generator().manual_seed(rows))
    weight[0, 0, :group] = 0
    weight[-1, -1, 1:] = 0
    importance = torch.rand(experts, 3 * group, generator=torch.Generator().manual_seed(1)) + 0.01
    scales, zeros = search_scales(weight, importance, 4, group, symmetric, signed)
    flat = weight.reshape(-1, group)
    h = int_grid.search_weights(importance.view(experts, 1, 3, group)).expand(-1, rows, -1, -1).reshape(flat.shape)
    expected, points = (
        int_grid._symmetric(flat, h, 4, signed, int_grid.RATIOS)
        if symmetric
        else int_grid._asymmetric(flat, h, 4, int_grid.RATIOS)
    )
    found = ((weight - dequantize(round_to_codes(weight, scales, zeros, 4))).square() * importance[:, None]).sum(-1)
    wanted = round_to_codes(
        weight, expected.view(scales.shape), None if points is None else points.view(scales.shape), 4
    )
    best = ((weight - dequantize(wanted)).square() * importance[:, None]).sum(-1)
    assert torch.allclose(found, best, rtol=0.02, atol=1e-6)
    assert (scales.flatten() != expected).float().mean() < 0.02  # codes halfway, candidates of equal cost


codes_of = st.integers(0, 9999).map(
    lambda seed: torch.randint(-8, 8, (2, 16, 40), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
)


@settings(max_examples=10, deadline=None)
@given(codes_of)
def test_packings_come_back(codes: torch.Tensor) -> None:
    assert torch.equal(unpack_rows(pack_rows(codes, 4), 4, 40), codes)
    ragged = codes[..., :37]
    assert torch.equal(unpack_rows(pack_rows(ragged, 4), 4, 37), ragged)
    assert torch.equal(unpack_rows(pack_rows(codes * 9, 8), 8, 40), codes * 9)
    assert torch.equal(unpack_awq(pack_awq(codes), 16), codes)
    assert torch.equal(unpack_gptq(pack_gptq(codes, 4), 4, 40), codes)
    assert torch.equal(unpack_gptq_zeros(pack_gptq_zeros(codes[..., :5], 4), 4, 16), codes[..., :5])
    assert torch.equal(unpack_zeros_ct(pack_zeros_ct(codes[..., :5], 4), 4, 16), codes[..., :5])


def test_words_by_their_definition() -> None:
    codes = torch.randint(-8, 8, (16, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    stored = codes.long() + 8

    def word(fields: torch.Tensor) -> int:
        value = sum(int(field) << (4 * i) for i, field in enumerate(fields))
        return value - (1 << 32) if value >= 1 << 31 else value

    assert pack_rows(codes, 4)[3, 1] == word(stored[3, 8:16])
    assert pack_gptq(codes, 4)[2, 5] == word(stored[5, 16:24])
    assert pack_awq(codes)[7, 1] == word(stored[[8 + i for i in AWQ_ORDER], 7])
    assert pack_gptq_zeros(torch.zeros(16, 3, dtype=torch.int8), 4)[0, 0] == 0x77777777


def test_sizes_that_do_not_pack_are_refused() -> None:
    odd = torch.zeros(12, 12, dtype=torch.int8)
    for pack in (pack_awq, lambda c: pack_gptq(c, 4), lambda c: pack_gptq_zeros(c, 4)):
        with pytest.raises(ValueError, match=r"12 (in|out)puts, expected a multiple of 8"):
            pack(odd)
    with pytest.raises(ValueError, match="3 bits, expected 2, 4 or 8"):
        pack_rows(odd, 3)
