"""GPTQ equals its textbook form (inverse Hessian), also on matrices that have no factor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmquant.quantize.integer import gptq
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import code_range, dequantize
from mmquant.quantize.integer.rtn import rtn_int


def textbook(weight: Tensor, second: Tensor, order: Tensor, scales: Tensor, bits: int, damping: float) -> Tensor:
    """Frantar's algorithm in float64 with given scales [O, G], columns in the given order; codes [O, n]."""
    low, high = code_range(bits)
    h = second.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    h, w = h[order][:, order], weight.double()[:, order].clone()
    group = weight.shape[1] // scales.shape[1]
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(w)
    for k in range(w.shape[1]):
        scale = scales[:, order[k] // group].double()
        codes[:, k] = (w[:, k] / scale).round().clamp(low, high)
        error = (w[:, k] - codes[:, k] * scale) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:]
        # Eliminate the column from the inverse: what remains is the inverse of the columns still free.
        inverse[k + 1 :, k + 1 :] -= inverse[k + 1 :, k : k + 1] @ inverse[k : k + 1, k + 1 :] / inverse[k, k]
    back = torch.zeros_like(codes)
    back[:, order] = codes
    return back


def problem(experts: int, outputs: int, inputs: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and correlated mean second moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(experts, inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(experts, rows, inputs, generator=generator) @ mix * torch.rand(inputs, generator=generator)
    return torch.randn(experts, outputs, inputs, generator=generator), x.mT @ x / rows


def loss(weight: Tensor, values: Tensor, second: Tensor) -> Tensor:
    error = weight - values
    return ((error @ second) * error).sum((-1, -2))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(32, 96), (64, 192), (-1, 50), (160, 160), (16, 48)]),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_equals_the_textbook(shape: tuple[int, int], outputs: int, experts: int, seed: int) -> None:
    group, inputs = shape
    weight, second = problem(experts, outputs, inputs, 3 * inputs, seed)
    solved = gptq.gptq_quantize(weight, second, GptqGrid(4, group))
    known = gptq.gptq_factor(second, inputs if group == -1 else group)
    for e in range(experts):
        order = known.order[e].flip(0)
        expected = textbook(weight[e], second[e], order, solved.weight.scales[e], 4, gptq.DAMPING)
        # Ties and float32 rounding may turn a code here and there; what follows it then differs as well.
        assert (expected != solved.weight.codes[e]).float().mean() < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_beats_nearest_rounding_of_the_same_grid(group: int, symmetric: bool) -> None:
    weight, second = problem(3, 24, 256, 700, 1)
    solved = gptq.gptq_quantize(weight, second, GptqGrid(4, group, symmetric))
    assert solved.weight.scales.shape == (3, 24, 256 // (256 if group == -1 else group))
    assert torch.equal(solved.weight.scales, solved.weight.scales.bfloat16().float())
    nearest = rtn_int(weight, 4, group, symmetric)
    ours, theirs = (loss(weight, dequantize(q), second) for q in (solved.weight, nearest))
    assert (ours < 0.75 * theirs).all()


def test_a_batch_gives_each_matrix_its_own_result() -> None:
    weight, second = problem(4, 9, 64, 200, 2)
    together = gptq.gptq_quantize(weight, second, GptqGrid(4, 32)).weight
    for e in range(4):
        alone = gptq.gptq_quantize(weight[e : e + 1], second[e : e + 1], GptqGrid(4, 32)).weight
        assert (together.codes[e] != alone.codes[0]).float().mean() < 0.01


def test_given_scales_are_used() -> None:
    weight, second = problem(2, 5, 64, 200, 3)
    scales = torch.full((2, 5, 2), 0.25)
    solved = gptq.gptq_quantize(weight, second, GptqGrid(4, 32), scales=scales, keep=True)
    assert torch.equal(solved.weight.scales, scales)
    assert solved.compensated is not None
    assert torch.equal(solved.weight.codes.float(), (solved.compensated / 0.25).round().clamp(-8, 7))


def test_moments_without_a_factor_are_damped_then_rounded() -> None:
    weight, second = problem(4, 6, 64, 200, 4)
    second[1] = torch.ones(64, 64) - 0.1 * torch.eye(64)  # indefinite: needs far more damping
    second[2] = 0.0  # saw nothing
    second[3, 5, 7] = second[3, 7, 5] = float("inf")
    solved = gptq.gptq_quantize(weight, second, GptqGrid(4, 32))
    assert solved.rounded.tolist() == [False, False, True, True]
    assert solved.damping[0] == pytest.approx(gptq.DAMPING)
    assert solved.damping[1] > gptq.DAMPING
    assert torch.isfinite(dequantize(solved.weight)).all()
    nearest = rtn_int(weight[2:3], 4, 32)
    assert torch.equal(solved.weight.codes[2], nearest.codes[0])


def test_dead_inputs_keep_their_weights() -> None:
    weight, second = problem(1, 6, 64, 200, 5)
    second[:, 10] = 0.0
    second[:, :, 10] = 0.0
    solved = gptq.gptq_quantize(weight, second, GptqGrid(4, 32))
    error = (dequantize(solved.weight) - weight)[0, :, 10].abs()
    # A channel that calibration never saw is still stored, within the range of its group.
    assert (error <= 0.5 * weight.abs().amax()).all()
    assert not solved.rounded.any()


@pytest.mark.parametrize(
    ("group", "bad", "words"), [(48, None, "group size 48 does not divide 64"), (32, float("nan"), "NaN or infinity")]
)
def test_bad_input(group: int, bad: float | None, words: str) -> None:
    weight, second = problem(1, 4, 64, 100, 6)
    if bad is not None:
        weight[0, 1, 2] = bad
    with pytest.raises(ValueError, match=words):
        gptq.gptq_quantize(weight, second, GptqGrid(4, group))
