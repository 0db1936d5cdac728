"""Bytes of the K-quants: super-blocks of 256 columns with 16 (Q2_K, Q3_K, Q6_K) or 8 (Q4_K, Q5_K) sub-blocks.

Source: block_q2_K ... block_q6_K in ggml-common.h, get_scale_min_k4 in ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import Blocks, bytes_half, half_bytes, join_bits, need, split


def pack_q2_k(blocks: Blocks) -> Tensor:
    """16 bytes of (minimum, step) nibbles, 64 bytes of 2-bit codes, d, dmin."""
    scales = (need(blocks.steps) | (need(blocks.minimums) << 4)).to(torch.uint8)
    quants = join_bits(blocks.codes.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([scales, quants, half_bytes(blocks.d), half_bytes(need(blocks.dmin))], 1)


def unpack_q2_k(data: Tensor) -> Blocks:
    """The inverse of `pack_q2_k`."""
    scales = data[:, :16].to(torch.int16)
    codes = split(data[:, 16:80].view(-1, 2, 32), 2, 4).flatten(1)
    return Blocks(codes, bytes_half(data[:, 80:82]), bytes_half(data[:, 82:]), scales & 15, scales >> 4)


def pack_q3_k(blocks: Blocks) -> Tensor:
    """32 bytes of third bits, 64 of two-bit codes, 12 of steps (4 low bits of all, then 2 high bits), d."""
    high = join_bits((blocks.codes >> 2).view(-1, 8, 32), 1)
    low = join_bits((blocks.codes & 3).view(-1, 2, 4, 32), 2).flatten(1)
    steps = (need(blocks.steps) + 32).to(torch.uint8)
    scales = torch.cat([join_bits((steps & 15).view(-1, 2, 8), 4), join_bits((steps >> 4).view(-1, 4, 4), 2)], 1)
    return torch.cat([high, low, scales, half_bytes(blocks.d)], 1)


def unpack_q3_k(data: Tensor) -> Blocks:
    """The inverse of `pack_q3_k`."""
    high, low = split(data[:, :32], 1, 8).flatten(1), split(data[:, 32:96].view(-1, 2, 32), 2, 4).flatten(1)
    steps = split(data[:, 96:104], 4, 2).flatten(1) | (split(data[:, 104:108], 2, 4).flatten(1) << 4)
    return Blocks(low | (high << 2), bytes_half(data[:, 108:]), steps=steps.to(torch.int16) - 32)


def pack_q4_k(blocks: Blocks) -> Tensor:
    """d, dmin, 12 bytes of 6-bit steps and minimums, 128 bytes of nibbles."""
    return torch.cat([_head(blocks), join_bits(blocks.codes.view(-1, 4, 2, 32), 4).flatten(1)], 1)


def unpack_q4_k(data: Tensor) -> Blocks:
    """The inverse of `pack_q4_k`."""
    codes = split(data[:, 16:].view(-1, 4, 32), 4, 2).flatten(1)
    return Blocks(codes, bytes_half(data[:, :2]), bytes_half(data[:, 2:4]), *_six_bits(data[:, 4:16]))


def pack_q5_k(blocks: Blocks) -> Tensor:
    """d, dmin, 12 bytes of 6-bit steps and minimums, 32 of fifth bits, 128 of nibbles."""
    high = join_bits((blocks.codes >> 4).view(-1, 8, 32), 1)
    low = join_bits((blocks.codes & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([_head(blocks), high, low], 1)


def unpack_q5_k(data: Tensor) -> Blocks:
    """The inverse of `pack_q5_k`."""
    codes = split(data[:, 48:].view(-1, 4, 32), 4, 2).flatten(1) | (split(data[:, 16:48], 1, 8).flatten(1) << 4)
    return Blocks(codes, bytes_half(data[:, :2]), bytes_half(data[:, 2:4]), *_six_bits(data[:, 4:16]))


def pack_q6_k(blocks: Blocks) -> Tensor:
    """128 bytes of low nibbles, 64 of two high bits, 16 signed steps, d."""
    codes = blocks.codes.view(-1, 2, 2, 64)  # half, low or high nibble, column
    low = join_bits(codes & 15, 4).flatten(1)
    high = join_bits((blocks.codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    steps = need(blocks.steps).to(torch.int8).view(torch.uint8)
    return torch.cat([low, high, steps, half_bytes(blocks.d)], 1)


def unpack_q6_k(data: Tensor) -> Blocks:
    """The inverse of `pack_q6_k`."""
    low = split(data[:, :128].view(-1, 2, 64), 4, 2).flatten(1)
    high = split(data[:, 128:192].view(-1, 2, 32), 2, 4).flatten(1)
    steps = data[:, 192:208].contiguous().view(torch.int8).to(torch.int16)
    return Blocks(low | (high << 4), bytes_half(data[:, 208:]), steps=steps)


def _head(blocks: Blocks) -> Tensor:
    steps, minimums = need(blocks.steps).to(torch.uint8), need(blocks.minimums).to(torch.uint8)
    low = steps[:, :4] | ((steps[:, 4:] >> 4) << 6)
    middle = minimums[:, :4] | ((minimums[:, 4:] >> 4) << 6)
    high = (steps[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    return torch.cat([half_bytes(blocks.d), half_bytes(need(blocks.dmin)), low, middle, high], 1)


def _six_bits(scales: Tensor) -> tuple[Tensor, Tensor]:
    low, middle, high = scales.view(-1, 3, 4).unbind(1)
    steps = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    minimums = torch.cat([middle & 63, (high >> 4) | ((middle >> 6) << 4)], 1)
    return steps.to(torch.int16), minimums.to(torch.int16)
