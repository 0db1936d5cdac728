"""Each rounding of activations, caches and probabilities equals its definition, computed another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from helpers import ggml_lib
from mmquant.calibration.model.attention import attend, block_of, in_blocks
from mmquant.calibration.model.llamacpp_activations import cache_rounding
from mmquant.calibration.model.roundings import (
    fp8_groups,
    fp8_mass,
    fp8_static,
    fp8_token,
    hadamard,
    nvfp4,
    power_above,
    q4_0,
    q8_0,
    rotated,
)

Floats = NDArray[np.float64]


def grid(exponents: int, mantissa: int, bias: int, largest: float) -> Floats:
    """All non-negative values of a small float, by its bits, in the order of their codes."""
    found = []
    for code in range(2 ** (exponents + mantissa)):
        high, low = code >> mantissa, code & (2**mantissa - 1)
        value = (low / 2**mantissa) * 2.0 ** (1 - bias) if high == 0 else (1 + low / 2**mantissa) * 2.0 ** (high - bias)
        found.append(value)
    return np.array([value for value in found if value <= largest])


E4M3, E2M1 = grid(4, 3, 7, 448.0), grid(2, 1, 1, 6.0)


def nearest(values: Floats, levels: Floats) -> Floats:
    """The nearest level to each value; of two as near the one with the even code."""
    size = np.minimum(np.abs(values), levels[-1])
    above = np.searchsorted(levels, size).clip(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    tie_up = (above % 2) == 0
    up = (high - size < size - low) | ((high - size == size - low) & tie_up)
    return np.copysign(np.where(up, high, low), values)


def scaled(x: Tensor, size: int, scale_of: Callable[[float], Any], levels: Floats) -> Floats:
    """Block by block, in float64 from scales in float32: what `levels` keep of x under the scale of each block."""
    out = np.empty(x.shape, np.float64)
    for row in range(len(x)):
        for start in range(0, x.shape[1], size):
            block = x[row, start : start + size].numpy()
            scale = np.float32(scale_of(float(np.abs(block).max())))
            out[row, start : start + size] = nearest((block / scale).astype(np.float64), levels) * np.float64(scale)
    return out


def inputs(seed: int, rows: int, width: int, scale: float) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    x[:, ::7] *= 30
    if seed % 3 == 0:
        x[0] = 0
    return x


@given(
    st.integers(0, 999), st.integers(1, 4), st.sampled_from([1, 16, 100, 128, 300]), st.sampled_from([1e-6, 1.0, 1e4])
)
@settings(max_examples=40, deadline=None)
def test_fp8_inputs(seed: int, rows: int, width: int, scale: float) -> None:
    x = inputs(seed, rows, width, scale)
    cases = (
        (fp8_token(x), width, lambda peak: max(np.float32(peak) / np.float32(448), np.float32(1 / (448 * 512)))),
        (fp8_groups(x), 128, lambda peak: np.float32(max(peak, 1e-10)) / np.float32(448)),
        (
            fp8_groups(x, True),
            128,
            lambda peak: 2.0 ** np.ceil(np.log2(np.float32(max(peak, 1e-10)) / np.float32(448))),
        ),
        (fp8_groups(x, size=32), 32, lambda peak: np.float32(max(peak, 1e-10)) / np.float32(448)),
    )
    for found, size, scale_of, *_ in cases:
        np.testing.assert_allclose(found.numpy(), scaled(x, size, scale_of, E4M3), rtol=1e-6, atol=0)


def test_powers_of_two_are_not_below() -> None:
    values = torch.tensor([1.0, 0.5, 0.75, 1.0000001, 3e-9, 2.0**-126])
    assert power_above(values).tolist() == [1.0, 0.5, 1.0, 2.0, 2.0**-28, 2.0**-126]


@given(st.integers(0, 999), st.integers(1, 4), st.sampled_from([16, 48, 256]), st.sampled_from([0.01, 1.0, 50.0]))
@settings(max_examples=40, deadline=None)
def test_fp4_inputs(seed: int, rows: int, width: int, scale: float) -> None:
    x = inputs(seed, rows, width, scale)
    divisor = 448 * 6 / max(float(x.abs().max()) * (0.5 if seed % 2 else 2), 1e-3)  # some blocks pass the largest scale

    def block(values: Floats) -> Floats:
        stored = nearest(np.array([np.abs(values).max() / 6 * divisor]), E4M3)[0]
        return nearest(values / (stored / divisor), E2M1) * stored / divisor if stored else np.zeros_like(values)

    wanted = np.concatenate([block(part) for part in x.double().numpy().reshape(-1, 16)]).reshape(x.shape)
    found = nvfp4(divisor)(x).double().numpy()
    apart = np.abs(found - wanted) > 1e-5 * np.abs(wanted) + 1e-12
    assert apart.mean() <= 0.01  # a value half-way between two codes in float64 may not be so in float32


def test_an_fp8_cache_has_one_scale_and_a_largest_value() -> None:
    x = torch.tensor([[0.0, 1.0, -3.3, 500.0, -1e6, 0.0019]])
    np.testing.assert_allclose(fp8_static(2.0)(x).numpy()[0], nearest(x[0].double().numpy() / 2, E4M3) * 2)
    assert fp8_static(2.0)(x.to(torch.bfloat16)).dtype == torch.bfloat16
    mass = torch.tensor([1.0, 0.7, 2.0**-15, 2.0**-18, 0.0])
    np.testing.assert_allclose(fp8_mass(mass).numpy(), nearest(mass.double().numpy() * 256, E4M3) / 256)


@given(seed=st.integers(0, 999), blocks=st.integers(1, 5), scale=st.sampled_from([1e-3, 1.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_q4_0_is_ggmls(seed: int, blocks: int, scale: float) -> None:
    ggml_lib.need()
    x = inputs(seed, 1, 32 * blocks, scale)[0]
    torch.testing.assert_close(q4_0(x), ggml_lib.ggml_rounds("q4_0", x, 32), rtol=1e-6, atol=0)


def test_what_a_cache_keeps_is_turned_and_turned_back() -> None:
    for size in (1, 2, 64, 128):
        signs = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
        torch.testing.assert_close(hadamard(size), torch.tensor(signs) / size**0.5)
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(rotated(lambda inside: inside, 64)(x), x, atol=1e-5, rtol=0)
    spike = torch.zeros(1, 64)
    spike[0, 5] = 8.0  # one large value among zeros: turned, all are 1, and 8 bits keep them
    torch.testing.assert_close(rotated(q8_0, 64)(spike), spike, atol=0.02, rtol=0)
    for head_dim, turned in ((32, False), (64, True), (96, False), (128, True), (192, True)):
        keys = cache_rounding("q8_0", head_dim)["key"]
        assert (keys is not q8_0) is turned, head_dim


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the definition, in float64, heads one by one."""
    batch, heads, length, width = q.shape
    share = heads // k.shape[1]
    out = torch.zeros(batch, heads, length, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                scores = k[b, h // share, : t + 1].double() @ q[b, h, t].double() / width**0.5
                out[b, h, t] = torch.softmax(scores, 0) @ v[b, h // share, : t + 1].double()
    return out


@pytest.mark.parametrize(("heads", "shared", "length"), [(4, 2, 7), (3, 1, 1), (6, 6, 13)])
def test_attention_in_blocks(heads: int, shared: int, length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    q = torch.randn(2, heads, length, 8, generator=draw) * 3
    k, v = (torch.randn(2, shared, length, 8, generator=draw) for _ in range(2))
    wanted = plain_attention(q, k, v)
    for limit in (1, 4 * 2 * heads * length * 3, 1 << 30):  # one query, three, all at once
        torch.testing.assert_close(in_blocks(q, k, v, None, limit).double(), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attend(q, k, v).double(), wanted, atol=1e-5, rtol=1e-4)
    seen: list[Tensor] = []
    attend(q, k, v, lambda mass: (seen.append(mass), mass)[1])
    assert all(bool((mass <= 1).all()) and bool((mass.amax(-1) == 1).all()) for mass in seen)
    half = attend(q, k, v, lambda mass: mass / 2)  # what is rounded away is not in the sum that divides
    torch.testing.assert_close(half.double(), wanted / 2, atol=1e-5, rtol=1e-4)


def test_blocks_of_queries_hold_so_many_bytes() -> None:
    for batch, heads, length in ((1, 48, 65536), (4, 4, 2048), (1, 1, 1)):
        block = block_of(batch, heads, length)
        assert 4 * batch * heads * length * block <= 256 << 20 or block == 1
        assert block == length or 4 * batch * heads * length * (block + 1) > 256 << 20
