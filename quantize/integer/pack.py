"""Pack integer codes into int32 words and back: compressed-tensors, AWQ (GEMM) and GPTQ (v1).

2, 4 and 8 bits are written, 1 to 8 are read. All take signed codes (-8..7 at 4 bits) and store code + 2^(bits-1), the
first element of a word in its lowest bits. Shapes are logical: O outputs, I inputs, G groups in a row. Sources:
compressed-tensors 0.15 to 0.20 pack-quantized; AutoAWQ gemm pack order [0, 2, 4, 6, 1, 3, 5, 7]; AutoGPTQ 0.7.1
qlinear_cuda_old (v1 zero points are stored minus one); AutoRound 0.16.1 bit_packing.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from mmquant.errors import InputError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., O, I] int8 -> int32 [..., O, ceil(I*bits/32)], packed along I, the ragged end filled with zero bits.

    bits: 2, 4 or 8.
    """
    per_word = _per_word(bits)
    stored = codes.to(torch.int32) + (1 << (bits - 1))
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[-1] % per_word))
    return _join(torch.unflatten(stored, -1, (-1, per_word)), bits)


def unpack_rows(words: Tensor, bits: int, inputs: int, dense: bool = True) -> Tensor:
    """int32 [..., O, words] -> codes [..., O, inputs] int8, as `pack_rows` stores them; bits: 1 to 8.

    dense  codes follow each other across the bounds of words; else a word holds whole codes (no difference for 1, 2,
    4 and 8 bits). Too few words are a fault of the caller.
    """
    fields = _stream(words, bits) if dense and 32 % bits else _split(words, bits)
    return (fields.flatten(-2)[..., :inputs] - (1 << (bits - 1))).to(torch.int8)


def words_of(count: int, bits: int, dense: bool = True) -> int:
    """How many words hold `count` codes."""
    return ceil(count * bits / 32) if dense else ceil(count / (32 // bits))


def pack_zeros_ct(zeros: Tensor, bits: int) -> Tensor:
    """compressed-tensors zero points [..., O, G] -> int32 [..., ceil(O*bits/32), G], packed along O."""
    return pack_rows(zeros.transpose(-1, -2), bits).transpose(-1, -2).contiguous()


def unpack_zeros_ct(words: Tensor, bits: int, outputs: int, dense: bool = True) -> Tensor:
    """Zero points [..., O, G] of compressed-tensors, as `pack_zeros_ct` stores them; else as `unpack_rows`."""
    return unpack_rows(words.transpose(-1, -2), bits, outputs, dense).transpose(-1, -2).contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes [..., O, I] (or zeros, I = G) -> int32 [..., I, O/8]: transposed, packed along O in AWQ's order."""
    outputs = codes.shape[-2]
    if outputs % 8:
        raise InputError(f"AWQ packing: {outputs} outputs, expected a multiple of 8")
    stored = torch.unflatten((codes.to(torch.int32) + 8).transpose(-1, -2), -1, (-1, 8))
    return _join(stored[..., list(AWQ_ORDER)], 4)


def unpack_awq(words: Tensor, outputs: int, bits: int = 4) -> Tensor:
    """int32 [..., I, O*bits/32] -> codes [..., O, I] int8, as `pack_awq` stores them; bits: 1 to 8 (AutoRound)."""
    whole = -(-outputs // 8) * 8
    stored = torch.unflatten(unpack_rows(words, bits, whole), -1, (-1, 8))
    natural = torch.empty_like(stored)
    natural[..., list(AWQ_ORDER)] = stored
    return natural.flatten(-2)[..., :outputs].transpose(-1, -2).contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., O, I] -> GPTQ qweight int32 [..., I*bits/32, O], packed along I."""
    if codes.shape[-1] % _per_word(bits):
        raise InputError(f"GPTQ packing: {codes.shape[-1]} inputs, expected a multiple of {_per_word(bits)}")
    return pack_rows(codes, bits).transpose(-1, -2).contiguous()


def unpack_gptq(words: Tensor, bits: int, inputs: int) -> Tensor:
    """Codes [..., O, inputs] int8, as `pack_gptq` stores them; bits: 1 to 8."""
    return unpack_rows(words.transpose(-1, -2), bits, inputs)


def pack_gptq_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points [..., O, G] -> GPTQ v1 qzeros int32 [..., G, O*bits/32], packed along O, stored minus one."""
    per_word = _per_word(bits)
    if zeros.shape[-2] % per_word:
        raise InputError(f"GPTQ packing: {zeros.shape[-2]} outputs, expected a multiple of {per_word}")
    stored = (zeros.to(torch.int32) + (1 << (bits - 1)) - 1) & ((1 << bits) - 1)
    return _join(torch.unflatten(stored.transpose(-1, -2), -1, (-1, per_word)), bits)


def unpack_gptq_zeros(words: Tensor, bits: int, outputs: int, plus_one: bool = True) -> Tensor:
    """Zero points [..., O, G] int8, as `pack_gptq_zeros` stores them; bits: 1 to 8.

    plus_one: one is added to what is stored, as GPTQ v1 does.
    """
    half = 1 << (bits - 1)
    stored = unpack_rows(words, bits, outputs).int()
    if plus_one:
        stored = (stored + half + 1) % (2 * half) - half
    return stored.to(torch.int8).transpose(-1, -2).contiguous()


def _per_word(bits: int) -> int:
    if bits not in (2, 4, 8):
        raise InputError(f"packing: {bits} bits, expected 2, 4 or 8")
    return 32 // bits


def _join(stored: Tensor, bits: int) -> Tensor:
    """Fields [..., per_word] int32 -> words [...]; the last field reaches the sign bit, as the layout wants."""
    words = stored[..., 0].clone()
    for index in range(1, stored.shape[-1]):
        words |= stored[..., index] << (bits * index)
    return words


def _split(words: Tensor, bits: int) -> Tensor:
    """Words [...] -> fields [..., 32//bits], each 0 .. 2^bits - 1."""
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _stream(words: Tensor, bits: int) -> Tensor:
    """Words [..., W] of which each `bits` hold 32 fields -> fields [..., ceil(W/bits), 32]."""
    blocks = torch.unflatten(torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)), -1, (-1, bits))
    fields: list[Tensor] = []
    for start in range(0, 32 * bits, bits):
        word, shift = divmod(start, 32)
        low = min(bits, 32 - shift)
        field = (blocks[..., word] >> shift) & ((1 << low) - 1)
        if low < bits:
            field = field | ((blocks[..., word + 1] & ((1 << (bits - low)) - 1)) << low)
        fields.append(field)
    return torch.stack(fields, -1)
