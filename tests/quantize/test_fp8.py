"""FP8 equals its bit layout and slow loops over tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmquant.quantize.fp8 import dequantize_tiles, quantize_channels, quantize_tiles, round_up_bfloat16


def e4m3_values() -> torch.Tensor:
    """The 253 finite values of e4m3fn from sign, exponent (bias 7) and mantissa."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1 if code & 0x80 else 1, (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            continue
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(sign * size)
    return torch.tensor(values)


def by_tiles(codes: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """The definition: one element at a time."""
    out = torch.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for col in range(codes.shape[1]):
            out[row, col] = float(codes[row, col]) * scales[row // tile[0], col // tile[1]]
    return out


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 8), (17, 9), (3, 24), (8, 16)])
@pytest.mark.parametrize("tile", [(8, 4), (4, 8)])
def test_tiles_equal_the_definition(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    tiles = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    scales = torch.rand(tiles, generator=generator) + 0.1
    assert torch.equal(dequantize_tiles(codes, scales, tile), by_tiles(codes, scales, tile))


def test_a_batch_is_each_matrix() -> None:
    codes = torch.randn(3, 40, 24).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 5, 6)
    batch = dequantize_tiles(codes, scales, (8, 4))
    for index in range(3):
        assert torch.equal(batch[index], by_tiles(codes[index], scales[index], (8, 4)))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_quantized_codes_are_the_nearest(rows: int, cols: int, scale: float) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 31 + cols)) * scale
    codes, scales = quantize_tiles(weight, (8, 4))
    spread = scales.repeat_interleave(8, 0)[:rows].repeat_interleave(4, 1)[:, :cols]
    best = ((weight / spread)[..., None] - e4m3_values()).abs().amin(-1)
    assert torch.allclose((weight / spread - codes.float()).abs(), best, rtol=0, atol=1e-4)
    assert codes.float().abs().max() <= 448


def test_a_dead_block_stays_zero_with_a_positive_scale() -> None:
    weight = torch.zeros(9, 5)
    weight[8, 4] = 3.0
    codes, scales = quantize_tiles(weight, (8, 4))
    assert bool((scales > 0).all())
    assert torch.allclose(dequantize_tiles(codes, scales, (8, 4)), weight, rtol=1e-6)


def test_channels_store_bfloat16_scales_and_never_saturate() -> None:
    weight = torch.randn(2, 33, 70) * torch.logspace(-6, 4, 33)[None, :, None]
    codes, scales = quantize_channels(weight)
    assert torch.equal(scales, scales.bfloat16().float())
    assert scales.shape == (2, 33, 1)
    assert bool((weight.abs().amax(-1, keepdim=True) / scales <= 448).all())
    # e4m3 keeps 3 bits after the point (half a step: 2^-4 relative), subnormals half of 2^-9 absolute
    error = (codes.float() * scales - weight).abs()
    assert bool((error <= weight.abs() * 2.0**-4 + scales * 2.0**-10).all())


@given(st.floats(2.0**-99, 2.0**99))
def test_bfloat16_is_rounded_up(value: float) -> None:
    given_value = torch.tensor([value])
    up = round_up_bfloat16(given_value)
    assert torch.equal(up, up.bfloat16().float())
    assert bool(up >= given_value)
    assert bool(up <= given_value * (1 + 2.0**-7))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_tiles(weight)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_channels(weight)


@pytest.mark.parametrize("tile", [(1 << 40, 1 << 40), (1 << 40, 2), (3, 1 << 40)])
def test_a_tile_larger_than_the_matrix_takes_no_memory(tile: tuple[int, int]) -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize_tiles(weight, tile)
    small = min(tile[0], 5), min(tile[1], 7)
    assert all(torch.equal(*pair) for pair in zip((codes, scales), quantize_tiles(weight, small), strict=True))
    assert torch.equal(dequantize_tiles(codes, scales, tile), by_tiles(codes, scales, tile))
