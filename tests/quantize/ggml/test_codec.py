"""Layouts of the ggml grid types equal those of ggml itself and of the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from torch import Tensor

from helpers import ggml_lib
from mmquant.quantize.ggml import codec
from mmquant.quantize.ggml.scalar.grid import FORMS, nearest_levels
from mmquant.quantize.ggml.types import FALLBACK, GGMLType, storable

KINDS = list(FORMS)
PLAIN = [GGMLType.F32, GGMLType.F16, GGMLType.BF16]
COLUMNS = 768  # three super-blocks: not a power of two


def random_bytes(kind: GGMLType, rows: int, seed: int = 0) -> Tensor:
    """Any bytes at all, except that float16 scales are finite (every sixth bit of an exponent is cleared)."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows * COLUMNS // kind.block_columns, kind.block_bytes), generator=generator)
    ends = {
        "Q2_K": (81, 83),
        "Q3_K": (109,),
        "Q6_K": (209,),
        "Q4_K": (1, 3),
        "Q5_K": (1, 3),
        "Q4_1": (1, 3),
        "Q5_1": (1, 3),
    }
    for high in () if kind is GGMLType.MXFP4 else ends.get(kind.name, (1,)):
        data[:, high] &= 0xBF
    if kind is GGMLType.MXFP4:
        data[:, 0] = data[:, 0].clamp(max=254)
    return data.to(torch.uint8).view(rows, -1)


def gguf_decode(data: Tensor, kind: GGMLType) -> Tensor:
    return torch.from_numpy(quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(int(kind))).copy())


def test_types_are_those_of_the_gguf_package() -> None:
    for kind in GGMLType:
        assert gguf.GGMLQuantizationType[kind.name] == kind
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind))] == (kind.block_columns, kind.block_bytes)
    assert set(FALLBACK) == {kind for kind in GGMLType if kind.block_columns == 256}


def test_fallbacks() -> None:
    assert storable(GGMLType.Q4_K, 512) is GGMLType.Q4_K
    assert storable(GGMLType.Q4_K, 288) is GGMLType.Q5_0
    assert storable(GGMLType.IQ2_XXS, 96) is GGMLType.IQ4_NL
    assert storable(GGMLType.Q6_K, 33) is GGMLType.F16
    assert storable(GGMLType.Q4_0, 48) is GGMLType.F16
    assert all(kind.block_columns == 32 for kind in FALLBACK.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("rows", [1, 5])
def test_any_bytes_decode_as_in_gguf_and_ggml(kind: GGMLType, rows: int) -> None:
    data = random_bytes(kind, rows)
    decoded = codec.decode(data, kind, COLUMNS)
    assert decoded.isfinite().all()
    assert torch.equal(decoded, gguf_decode(data, kind))
    ggml_lib.need()
    assert torch.equal(decoded, ggml_lib.decode(data, kind, COLUMNS))


def test_all_exponents_of_mxfp4() -> None:
    """Also those whose step is subnormal in float32."""
    data = torch.randint(0, 256, (252, 17), generator=torch.Generator().manual_seed(9), dtype=torch.uint8)
    data[:, 0] = torch.arange(252)  # beyond, twelve steps are more than float32 holds
    decoded = codec.decode(data, GGMLType.MXFP4, 32)
    assert decoded[0].abs().max() > 0
    assert torch.equal(decoded, gguf_decode(data, GGMLType.MXFP4))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_bytes_survive_unpacking_and_packing(kind: GGMLType) -> None:
    data = random_bytes(kind, 3)
    grid, codes = codec.unpack(data, kind, COLUMNS)
    again = codec.pack(grid, codes)
    if kind is GGMLType.MXFP4:  # the nibble 8 is -0 and comes back as 0
        assert torch.equal(codec.decode(again, kind, COLUMNS), codec.decode(data, kind, COLUMNS))
        return
    assert torch.equal(again, data)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_grid_taken_apart_gives_what_encode_gives(kind: GGMLType) -> None:
    rows = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.03
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) + 0.01
    grid = codec.search(rows, kind, importance)
    codes = codec.nearest(grid, 0, rows)
    direct = codec.decode(codec.encode(rows, kind, importance), kind, COLUMNS)
    ours = codec.decode(codec.pack(grid, codes), kind, COLUMNS)
    assert torch.equal(codec.values(grid, codes), ours)
    # Ties may fall to either side: the errors are the same, and almost all values.
    assert torch.allclose((ours - rows).abs(), (direct - rows).abs(), rtol=1e-3, atol=1e-7)
    part = codec.nearest(grid, 37, rows[:, 37:300])
    assert torch.equal(part, codes[:, 37:300])
    assert torch.equal(codec.values(grid, part, 37), ours[:, 37:300])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_grids_of_neighbouring_columns_are_joined(kind: GGMLType) -> None:
    rows = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(3))
    whole = codec.search(rows, kind)
    parts = codec.concatenate([codec.search(rows[:, a : a + 256], kind) for a in range(0, COLUMNS, 256)])
    assert torch.equal(whole.step, parts.step)
    codes = codec.nearest(parts, 0, rows)
    assert torch.equal(codec.pack(parts, codes), codec.pack(whole, codes))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_nearest_levels_by_trying_all(kind: GGMLType) -> None:
    form = FORMS[kind]
    low, high = form.levels[0], form.levels[-1]
    y = torch.linspace(1.3 * low - 1, 1.3 * high + 1, 4001, dtype=torch.float64)
    levels = torch.tensor(form.levels, dtype=torch.float64)
    distance = (y[:, None] - levels[form.unused :]).abs()
    chosen = levels[nearest_levels(y.float(), form).int()]
    assert torch.allclose((y - chosen).abs(), distance.amin(1), atol=1e-5)


@pytest.mark.parametrize("kind", PLAIN, ids=lambda k: k.name)
def test_plain_types_round_to_nearest_even(kind: GGMLType) -> None:
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))
    data = codec.encode(rows, kind)
    assert data.shape == (3, kind.row_bytes(7))
    expected = {GGMLType.F32: rows, GGMLType.F16: rows.half().float(), GGMLType.BF16: rows.bfloat16().float()}[kind]
    assert torch.equal(codec.decode(data, kind, 7), expected)
    raw = data.numpy().view({4: np.float32, 2: np.float16}[kind.block_bytes])
    if kind is not GGMLType.BF16:
        assert torch.equal(torch.from_numpy(raw.astype(np.float32)), expected)


def test_bytes_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Q4_K: torch\.uint8 of shape"):
        codec.decode(torch.zeros(2, 143, dtype=torch.uint8), GGMLType.Q4_K, 256)
    with pytest.raises(ValueError, match="rows of 100 columns, expected a multiple of 256"):
        codec.decode(torch.zeros(2, 144, dtype=torch.uint8), GGMLType.Q4_K, 100)
