"""Bit layouts of IQ1_S to IQ3_S: fields of a super-block to bytes and back.

A super-block is 256 weights: weight = d * (offset + step * level) * (sign * point + delta), where `d` is an fp16,
`level` a 3- or 4-bit integer per 16 or 32 weights, and `point` a row of the type's codebook for each group of 4 or 8
weights. Source: the block structs of ggml-common.h and ggml's dequantize_row_iq*; checked in the tests against ggml
and gguf-py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .tables import points_on, with_parity

SUPER = 256
DELTA = 0.125  # IQ1: every point of a codebook is shifted by +-DELTA


class Signs(Enum):
    """How a type stores the signs of its weights."""

    FREE = "a sign for each weight"
    PARITY = "an even number of minus signs in each 8 weights"
    DELTA = "signed points, shifted by a signed delta"


@dataclass(frozen=True)
class Layout:
    """One type: `bytes` of a super-block, weights `shared` by a level, `group` of a point; d*(offset+step*level)."""

    name: str
    bytes: int
    shared: int
    group: int
    levels: int
    offset: float
    step: float
    signs: Signs

    @property
    def groups(self) -> int:
        """Points in a super-block."""
        return SUPER // self.group

    @property
    def blocks(self) -> int:
        """Levels in a super-block."""
        return SUPER // self.shared


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("IQ3_S", 110, 32, 4, 16, 1.0, 2.0, Signs.FREE),
        Layout("IQ3_XXS", 98, 32, 4, 16, 0.25, 0.5, Signs.PARITY),
        Layout("IQ2_S", 82, 16, 8, 16, 0.125, 0.25, Signs.FREE),
        Layout("IQ2_XS", 74, 16, 8, 16, 0.125, 0.25, Signs.PARITY),
        Layout("IQ2_XXS", 66, 32, 8, 16, 0.125, 0.25, Signs.PARITY),
        Layout("IQ1_M", 56, 16, 8, 8, 1.0, 2.0, Signs.DELTA),
        Layout("IQ1_S", 50, 32, 8, 8, 1.0, 2.0, Signs.DELTA),
    )
}


@dataclass(frozen=True)
class Fields:
    """What N super-blocks store.

    scale  [N] float16
    level  [N, blocks] uint8
    code   [N, groups] int16, a row of the codebook
    signs  [N, 32] uint8, bit i = minus at position i of each 8 weights; IQ1: 0
    minus  [N, 32] bool: IQ1: this group's delta is negative (IQ1_S: equal in each four); others: False
    """

    scale: Tensor
    level: Tensor
    code: Tensor
    signs: Tensor
    minus: Tensor


def field_values(fields: Fields, layout: Layout) -> Tensor:
    """The weights that `fields` stand for: float32 [N, 256]; all products are exact, so they are ggml's bit by bit."""
    count = fields.scale.shape[0]
    points = points_on(layout.name, fields.scale.device)[fields.code.long()].reshape(count, -1, 8)
    if layout.signs is Signs.DELTA:
        unit = points + torch.where(fields.minus, -DELTA, DELTA).unsqueeze(-1)
        multiplier = 2 * fields.level.float() + 1
    else:
        unit = points * (1 - 2 * unpack_bits(fields.signs).float())
        # ggml: d * (0.5 + level) * 0.25 (IQ2), * 0.5 (IQ3_XXS), d * (1 + 2 * level) (IQ3_S): exact factors, any order
        multiplier = layout.offset + layout.step * fields.level.float()
    scale = (fields.scale.float().unsqueeze(1) * multiplier).repeat_interleave(layout.shared // 8, 1)
    return (scale.unsqueeze(-1) * unit).reshape(count, SUPER)


def unpack_bits(packed: Tensor) -> Tensor:
    """Bits of each byte, lowest first: uint8 [...] -> uint8 [..., 8]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts) & 1


def pack_bits(bits: Tensor) -> Tensor:
    """Inverse of `unpack_bits`: [..., 8] -> uint8 [...]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)


def _u16(data: Tensor) -> Tensor:
    """Little-endian bytes [N, 2k] -> int32 [N, k]."""
    pairs = data.reshape(data.shape[0], -1, 2).int()
    return pairs[..., 0] | (pairs[..., 1] << 8)


def _bytes(words: Tensor, size: int) -> Tensor:
    """Whole numbers [N, k] -> little-endian uint8 [N, k * size]."""
    parts = [((words >> (8 * i)) & 255).to(torch.uint8) for i in range(size)]
    return torch.stack(parts, -1).reshape(words.shape[0], -1)


def _half_bytes(scale: Tensor) -> Tensor:
    return scale.half().contiguous().view(torch.uint8).reshape(-1, 2)


def _nibbles(level: Tensor) -> Tensor:
    return (level[:, 0::2] | (level[:, 1::2] << 4)).to(torch.uint8)


def _from_nibbles(data: Tensor) -> Tensor:
    return torch.stack((data & 15, data >> 4), -1).reshape(data.shape[0], -1)


def _low(code: Tensor) -> Tensor:
    return (code & 255).to(torch.uint8)


def _fold(parts: Tensor, bits: int) -> Tensor:
    """[N, k, m] fields of `bits` bits, lowest first -> int64 [N, k]."""
    shifts = torch.arange(parts.shape[-1], device=parts.device) * bits
    return (parts.long() << shifts).sum(-1)


def _unfold(words: Tensor, bits: int, count: int) -> Tensor:
    """int [N, k] -> [N, k * count] fields of `bits` bits, lowest first."""
    shifts = torch.arange(count, device=words.device) * bits
    return ((words.unsqueeze(-1).long() >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def pack_fields(fields: Fields, layout: Layout) -> Tensor:
    """uint8 [N, layout.bytes]."""
    count = fields.scale.shape[0]
    half, level, code = _half_bytes(fields.scale), fields.level, fields.code.int()
    seven = (fields.signs & 127).reshape(count, -1, 4)
    match layout.name:
        case "IQ2_XXS":
            words = torch.cat((_low(code).reshape(count, 8, 4), _word(seven, level)), -1)
            parts = [half, words.reshape(count, -1)]
        case "IQ3_XXS":
            parts = [half, _low(code), _word(seven, level).reshape(count, -1)]
        case "IQ2_XS":
            parts = [half, _bytes(code | ((fields.signs & 127).int() << 9), 2), _nibbles(level)]
        case "IQ2_S":
            high = _fold((code >> 8).reshape(count, 8, 4), 2).to(torch.uint8)
            parts = [half, _low(code), fields.signs, high, _nibbles(level)]
        case "IQ3_S":
            high = _fold((code >> 8).reshape(count, 8, 8), 1).to(torch.uint8)
            parts = [half, _low(code), high, fields.signs, _nibbles(level)]
        case "IQ1_S":
            high = _fold((code >> 8).reshape(count, 8, 4), 3) | (level.long() << 12)
            parts = [half, _low(code), _bytes(high | (fields.minus[:, ::4].long() << 15), 2)]
        case _:
            parts = _pack_iq1_m(fields)
    return torch.cat(parts, 1)


def _word(seven: Tensor, level: Tensor) -> Tensor:
    """Four 7-bit signs and a 4-bit level as 4 bytes: [N, 8, 4], [N, 8] -> uint8 [N, 8, 4]."""
    word = _fold(seven, 7) | (level.long() << 28)
    return _bytes(word, 4).reshape(level.shape[0], -1, 4)


def _pack_iq1_m(fields: Fields) -> list[Tensor]:
    count = fields.scale.shape[0]
    code = fields.code.int()
    high = (code >> 8) | (fields.minus.int() << 3)
    half = _u16(_half_bytes(fields.scale))
    quarters = (half >> torch.arange(0, 16, 4, device=half.device)) & 15
    words = _fold(fields.level.reshape(count, 4, 4), 3) | (quarters.long() << 12)
    return [_low(code), _nibbles(high), _bytes(words, 2)]


def unpack_fields(data: Tensor, layout: Layout) -> Fields:
    """Fields of uint8 [N, layout.bytes]."""
    count = data.shape[0]
    zeros = torch.zeros(count, 32, dtype=torch.uint8, device=data.device)
    half = data[:, :2].contiguous().view(torch.float16).reshape(-1)
    signs, minus, body = zeros, zeros.bool(), data[:, 2:]
    match layout.name:
        case "IQ2_XXS" | "IQ3_XXS":
            code, signs, level = _unpack_xxs(body, layout)
        case "IQ2_XS":
            words = _u16(body[:, :64])
            code, signs = words & 511, with_parity((words >> 9).to(torch.uint8))
            level = _from_nibbles(body[:, 64:])
        case "IQ2_S":
            code = body[:, :32].long() | (_unfold(body[:, 64:72], 2, 4) << 8)
            signs, level = body[:, 32:64], _from_nibbles(body[:, 72:])
        case "IQ3_S":
            code = body[:, :64].long() | (_unfold(body[:, 64:72], 1, 8) << 8)
            signs, level = body[:, 72:104], _from_nibbles(body[:, 104:])
        case "IQ1_S":
            words = _u16(body[:, 32:])
            code, level = body[:, :32].long() | (_unfold(words, 3, 4) << 8), (words >> 12) & 7
            minus = (words >> 15).bool().repeat_interleave(4, 1)
        case _:
            half, code, minus, level = _unpack_iq1_m(data)
    return Fields(half, level.to(torch.uint8), code.to(torch.int16), signs.contiguous(), minus)


def _unpack_xxs(body: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    count = body.shape[0]
    if layout.group == 8:
        halves = body.reshape(count, 8, 8)
        code, tail = halves[..., :4].reshape(count, -1), halves[..., 4:].reshape(count, -1)
    else:
        code, tail = body[:, :64], body[:, 64:]
    pairs = _u16(tail).long()
    words = pairs[:, 0::2] | (pairs[:, 1::2] << 16)
    return code.int(), with_parity(_unfold(words, 7, 4).to(torch.uint8)), words >> 28


def _unpack_iq1_m(data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    high, words = _from_nibbles(data[:, 32:48]), _u16(data[:, 48:])
    code = data[:, :32].long() | ((high & 7).long() << 8)
    half = _fold(words.unsqueeze(1) >> 12, 4)
    return _bytes(half, 2).view(torch.float16).reshape(-1), code, (high >> 3).bool(), _unfold(words, 3, 4)
