"""EXL3's decoder against its description, taken word by word: strings of bits, Python integers, float64 products."""

from __future__ import annotations

import math
import struct
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmquant.quantize import trellis

BOOKS = ("3inst", "mcg", "mul1")
WORDS = (*range(16, 129, 16), 24, 40, 56)  # of a tile: 16 K


def half(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def rounded(value: float) -> float:
    return struct.unpack("<e", struct.pack("<e", value))[0]


@cache
def value(book: str, state: int) -> float:
    if book == "mul1":
        product = state * 0x83DCD12D % 2**32
        return rounded((1024 + sum(product.to_bytes(4, "little"))) * half(0x1EEE) + half(0xC931))
    product = state * 89226354 + 64248484 if book == "3inst" else state * 0xCBAC1FED
    mixed = product % 2**32 & 0x8FFF8FFF ^ 0x3B603B60
    return rounded(half(mixed % 2**16) + half(mixed // 2**16))


def tile(words: list[int], book: str) -> np.ndarray:
    """[16, 16] inputs by outputs of a tile's 16-bit words as they are stored."""
    pairs = [low % 2**16 | (high % 2**16) << 16 for low, high in zip(words[::2], words[1::2], strict=True)]
    bits = "".join(f"{pair:032b}" for pair in pairs)
    ring = bits[-16:] + bits  # what ends at bit 0 comes first
    found = np.full((16, 16), np.nan)
    for t in range(256):
        end = (t + 1) * len(words) // 16
        window = ring[end : end + 16]
        lane, j = t // 8, t % 8
        r0 = 2 * (lane % 4)
        row = [r0, r0 + 1, r0 + 8, r0 + 9][j % 4]
        found[row, lane // 4 + (0 if j < 4 else 8)] = value(book, int(window, 2))
    return found


def reference(codes: Tensor, suh: Tensor, svh: Tensor, book: str) -> Tensor:
    """[O, I] in float64: diag(suh) H T H diag(svh), with H by its definition."""
    rows, columns = codes.shape[:2]
    plain = np.block([[tile(codes[i, j].tolist(), book) for j in range(columns)] for i in range(rows)])
    signs = [[(-1) ** (i & j).bit_count() / math.sqrt(128) for j in range(128)] for i in range(128)]
    left, right = (np.kron(np.eye(side // 8), np.array(signs)) for side in (rows, columns))
    whole = suh.double().numpy()[:, None] * (left @ plain @ right) * svh.double().numpy()
    return torch.from_numpy(whole.T)


def random_parts(rows: int, columns: int, words: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << 15), 1 << 15, (8 * rows, 8 * columns, words), generator=g).to(torch.int16)
    suh, svh = (torch.randn(128 * n, generator=g).half().float() for n in (rows, columns))
    return codes, suh, svh


@pytest.mark.parametrize("book", BOOKS)
def test_every_value_of_a_codebook(book: str) -> None:
    assert trellis.codebook(book, torch.device("cpu")).tolist() == [value(book, state) for state in range(1 << 16)]


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (1, 3)]),
    st.sampled_from(WORDS),
    st.sampled_from(BOOKS),
    st.integers(0, 99),
)
def test_a_matrix_is_what_the_description_says(blocks: tuple[int, int], words: int, book: str, seed: int) -> None:
    rows, columns = blocks
    codes, suh, svh = random_parts(rows, columns, words, seed)
    expected = reference(codes, suh, svh, book)
    found = trellis.matrix(codes, suh, svh, book)
    assert found.shape == (128 * columns, 128 * rows)
    assert found.dtype == torch.float32
    scale = svh.double().abs()[:, None] * suh.double().abs()  # T is near one
    assert bool(((found - expected).abs() <= 1e-5 * scale).all())


@pytest.mark.parametrize("words", WORDS)
def test_tiles_are_exact_for_every_width(words: int) -> None:
    codes, _, _ = random_parts(1, 1, words, words)
    for book in BOOKS:
        found = trellis.tiles(codes, book).T.unflatten(0, (8, 16)).unflatten(2, (8, 16))
        for i, j in ((0, 0), (3, 5), (7, 7)):
            assert np.array_equal(found[i, :, j].numpy(), tile(codes[i, j].tolist(), book))


@pytest.mark.parametrize("at_once", [1, 128 * 384, 2 * 128 * 384 + 1])
def test_parts_make_the_same_matrix(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Columns of blocks are decoded a few at a time; a matrix product may round otherwise for another size."""
    codes, suh, svh = random_parts(3, 5, 48, 1)
    whole = trellis.matrix(codes, suh, svh, "mul1")
    monkeypatch.setattr(trellis, "AT_ONCE", at_once)
    assert torch.allclose(trellis.matrix(codes, suh, svh, "mul1"), whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("words", WORDS)
def test_a_gpu_decodes_the_same(words: int, book: str) -> None:
    codes, suh, svh = random_parts(2, 3, words, words)
    assert torch.equal(trellis.tiles(codes.cuda(), book).cpu(), trellis.tiles(codes, book))
    found = trellis.matrix(codes.cuda(), suh.cuda(), svh.cuda(), book).cpu()
    whole = trellis.matrix(codes, suh, svh, book)
    assert torch.allclose(found, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
