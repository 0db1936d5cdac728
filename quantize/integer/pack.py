"""Pack integer codes into int32 words and back: compressed-tensors, AWQ (GEMM) and GPTQ (v1).

All take signed codes (-8..7 at 4 bits) and store code + 2^(bits-1), the first element of a word in its lowest bits.
Shapes are logical: O outputs, I inputs, G groups in a row. Sources: compressed-tensors 0.17 pack-quantized; AutoAWQ
gemm pack order [0, 2, 4, 6, 1, 3, 5, 7]; AutoGPTQ 0.7.1 qlinear_cuda_old (v1 zero points are stored minus one).
"""

from __future__ import annotations

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


def unpack_rows(words: Tensor, bits: int, inputs: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [..., O, words] -> codes [..., O, inputs] int8."""
    stored = _split(words, bits).flatten(-2)[..., :inputs]
    return (stored - (1 << (bits - 1))).to(torch.int8)


def pack_zeros_ct(zeros: Tensor, bits: int) -> Tensor:
    """compressed-tensors zero points [..., O, G] -> int32 [..., ceil(O*bits/32), G], packed along O."""
    return pack_rows(zeros.transpose(-1, -2), bits).transpose(-1, -2).contiguous()


def unpack_zeros_ct(words: Tensor, bits: int, outputs: int) -> Tensor:
    """Inverse of `pack_zeros_ct`."""
    return unpack_rows(words.transpose(-1, -2), bits, outputs).transpose(-1, -2).contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes [..., O, I] (or zeros, I = G) -> int32 [..., I, O/8]: transposed, packed along O in AWQ's order."""
    outputs = codes.shape[-2]
    if outputs % 8:
        raise InputError(f"AWQ packing: {outputs} outputs, expected a multiple of 8")
    stored = torch.unflatten((codes.to(torch.int32) + 8).transpose(-1, -2), -1, (-1, 8))
    return _join(stored[..., list(AWQ_ORDER)], 4)


def unpack_awq(words: Tensor) -> Tensor:
    """Inverse of `pack_awq`: int32 [..., I, O/8] -> codes [..., O, I] int8."""
    stored = _split(words, 4)
    natural = torch.empty_like(stored)
    natural[..., list(AWQ_ORDER)] = stored
    return (natural.flatten(-2) - 8).to(torch.int8).transpose(-1, -2).contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., O, I] -> GPTQ qweight int32 [..., I*bits/32, O], packed along I."""
    if codes.shape[-1] % _per_word(bits):
        raise InputError(f"GPTQ packing: {codes.shape[-1]} inputs, expected a multiple of {_per_word(bits)}")
    return pack_rows(codes, bits).transpose(-1, -2).contiguous()


def unpack_gptq(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_gptq`."""
    rows = words.transpose(-1, -2)
    return unpack_rows(rows, bits, rows.shape[-1] * _per_word(bits))


def pack_gptq_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points [..., O, G] -> GPTQ v1 qzeros int32 [..., G, O*bits/32], packed along O, stored minus one."""
    per_word = _per_word(bits)
    if zeros.shape[-2] % per_word:
        raise InputError(f"GPTQ packing: {zeros.shape[-2]} outputs, expected a multiple of {per_word}")
    stored = (zeros.to(torch.int32) + (1 << (bits - 1)) - 1) & ((1 << bits) - 1)
    return _join(torch.unflatten(stored.transpose(-1, -2), -1, (-1, per_word)), bits)


def unpack_gptq_zeros(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_gptq_zeros`: -> [..., O, G] int8."""
    stored = (_split(words, bits).flatten(-2) + 1) & ((1 << bits) - 1)
    return (stored - (1 << (bits - 1))).to(torch.int8).transpose(-1, -2).contiguous()


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
    """Words [...] -> fields [..., 32/bits], each 0 .. 2^bits - 1."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
