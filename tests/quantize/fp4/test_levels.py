"""E2M1 levels by brute force, and nibbles as compressed-tensors reads them."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

from mmquant.quantize.fp4.levels import LEVELS, MAGNITUDES, from_nibbles, nearest, to_nibbles

CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # OCP MX 1.0, table 5


def test_levels_are_twice_the_codes() -> None:
    assert [m / 2 for m in MAGNITUDES] == CODES
    assert list(LEVELS) == sorted({s * m for m in MAGNITUDES for s in (1, -1)})


def brute(value: float) -> float:
    """Of equally near codes the even one."""
    code = min(range(8), key=lambda c: (abs(abs(value) / 2 - CODES[c]), c % 2))
    return 2 * CODES[code] * (-1 if value < 0 else 1)


def test_nearest_is_the_nearest() -> None:
    ties = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0])
    dense = torch.linspace(-15, 15, 4001)
    for value in torch.cat((ties, -ties, dense)).tolist():
        assert float(nearest(torch.tensor(value))) == brute(value), value


def test_nibbles() -> None:
    codes = torch.tensor(LEVELS, dtype=torch.int8)
    pairs = torch.cartesian_prod(codes, codes).flatten()[None]  # every byte but those with minus zero
    packed = to_nibbles(pairs)
    assert torch.equal(from_nibbles(packed, pairs.shape[1]), pairs.float())
    theirs = unpack_fp4_from_uint8(packed, 1, pairs.shape[1])
    assert torch.equal(2 * theirs.float(), pairs.float())
    everything = torch.arange(256, dtype=torch.uint8)[None]
    again = from_nibbles(everything, 512)
    assert torch.equal(to_nibbles(again), everything)
    assert torch.equal(again / 2, unpack_fp4_from_uint8(everything, 1, 512).float())
    assert from_nibbles(everything, 511).shape == (1, 511)
