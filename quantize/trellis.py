"""EXL3's weights: a ring of bits for each tile, a computed codebook of 2^16 values, Hadamard transforms outside.

A matrix W [I, O] is diag(suh) H T H diag(svh), H the Sylvester matrix of 128 over sqrt(128) on each block of 128. T
lies in tiles of 16 x 16; a tile is 256 K bits in a ring, K a multiple of 1/2. Its weight t is the codebook's value of
the 16 bits that end at bit floor((t + 1) K), counted from the highest bit of the first little-endian 32-bit word.
Source: exllamav3 1.6.5, exllamav3_ext/quant (exl3_dq.cuh, codebook.cuh, reconstruct.cu), modules/quant/exl3.py.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor, sqrt

import torch
from torch import Tensor

BLOCK, SIDE = 128, 16  # sides of a Hadamard block and of a tile
STATES = 1 << 16
WEIGHTS = SIDE * SIDE
AT_ONCE = 1 << 22  # weights that are decoded together: about 60 MB on the way
MULTIPLIERS = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
_INCREMENT = 64248484  # of 3inst
_MASK, _FLIP = 0x8FFF8FFF, 0x3B603B60


def _half(bits: Tensor) -> Tensor:
    """The float16 numbers with these bits, as float32."""
    return bits.to(torch.int16).view(torch.float16).float()


@lru_cache
def codebook(name: str, device: torch.device) -> Tensor:
    """[65536] float32: the value of each state, exact in float16."""
    x = torch.arange(STATES) * MULTIPLIERS[name] + (_INCREMENT if name == "3inst" else 0) & 0xFFFFFFFF
    if name == "mul1":
        total = sum((x >> shift & 0xFF for shift in (0, 8, 16, 24)), torch.tensor(1024))
        # The product and the sum are exact in float32, which makes it one rounding as in a fused one.
        values = total.float() * _half(torch.tensor(0x1EEE)) + _half(torch.tensor(0xC931 - STATES))
    else:
        x = x & _MASK ^ _FLIP
        values = _half(_signed(x & 0xFFFF)) + _half(_signed(x >> 16))
    return values.half().float().to(device)


def _signed(bits: Tensor) -> Tensor:
    return bits - (bits >= 1 << 15) * STATES


@lru_cache
def hadamard(device: torch.device) -> Tensor:
    """[128, 128] float32: the Sylvester matrix over sqrt(128), which is its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < BLOCK:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / sqrt(BLOCK)).to(device)


@lru_cache
def _windows(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([256] first 16-bit word, [256] right shift of it and the next) of a tile's weights, column by column.

    Tensor cores' order: weight 8 lane + j lies in row 2 (lane % 4) + (0, 1, 8, 9)[j % 4] and column lane // 4,
    from j = 4 on eight further.
    """
    start, shift = [0] * WEIGHTS, [0] * WEIGHTS
    for t in range(WEIGHTS):
        lane, j = divmod(t, 8)
        row, column = 2 * (lane % 4) + (0, 1, 8, 9)[j % 4], lane // 4 + 8 * (j // 4)
        first = floor((t + 1) * words / 16) - 16
        start[SIDE * column + row] = first // 16 % words
        shift[SIDE * column + row] = 16 - first % 16
    return torch.tensor(start, device=device), torch.tensor(shift, dtype=torch.int32, device=device)


def tiles(trellis: Tensor, name: str) -> Tensor:
    """[O, I] float32 before the transforms, of a trellis [I/16, O/16, 16 K] int16 in a codebook."""
    rows, columns, words = trellis.shape
    start, shift = _windows(words, trellis.device)
    halves = torch.unflatten(trellis, -1, (-1, 2)).flip(-1).flatten(-2).to(torch.int32)  # a word's upper half is first
    pairs = halves << 16 | halves.roll(-1, -1) & 0xFFFF
    states = pairs.index_select(-1, start).bitwise_right_shift_(shift).bitwise_and_(0xFFFF)
    states = states.view(rows, columns, SIDE, SIDE).permute(1, 2, 0, 3).reshape(-1)
    return codebook(name, trellis.device).index_select(0, states).view(SIDE * columns, SIDE * rows)


def matrix(trellis: Tensor, suh: Tensor, svh: Tensor, name: str) -> Tensor:
    """Weights [O, I] float32 of a trellis [I/16, O/16, 16 K] int16 and scales suh [I], svh [O] float32."""
    inputs, h = len(suh), hadamard(trellis.device)
    out = torch.empty((len(svh), inputs), device=trellis.device)
    step = max(1, AT_ONCE // (BLOCK * inputs)) * BLOCK
    for first in range(0, len(svh), step):
        part = tiles(trellis[:, first // SIDE : (first + step) // SIDE], name)
        part = (part.view(-1, BLOCK) @ h).view(-1, BLOCK, inputs)
        part = torch.matmul(h, part, out=out[first : first + step].view(-1, BLOCK, inputs))
        part.mul_(suh).mul_(svh[first : first + step].view(-1, BLOCK, 1))
    return out
