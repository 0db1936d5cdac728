"""How engines round activations, keys and values: each takes x [..., n] float32 and gives what the engine multiplies.

FP8 (E4M3): vLLM's per_token_quant_fp8 and per_token_group_quant_fp8 (scale = largest / 448, codes to nearest even);
DeepGEMM raises each scale to a power of two (ue8m0). NVFP4: vLLM's scaled_fp4_quant (nvfp4_utils.cuh). Q8_0, Q8_K, Q4_0
and the rotation before a quantized cache: llama.cpp's quantize_row_*_ref and llama-kv-cache.cpp (attn_rot).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...quantize.fp4.levels import nearest
from .forward import Change

E4M3_MAX, E2M1_MAX = 448.0, 6.0
LEAST = {"token": 1.0 / (E4M3_MAX * 512.0), "group": 1e-10}  # vLLM: of a token's scale, of a group's largest value
GROUP, FP4_GROUP = 128, 16


def e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 values, float32; beyond 448 the largest."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def brain(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in x's dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, in x's dtype."""
    return x.to(torch.float16).to(x.dtype)


def fp8_token(x: Tensor) -> Tensor:
    """E4M3 under one scale for each row."""
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=LEAST["token"])
    return e4m3(x / scale) * scale


def fp8_groups(x: Tensor, powers: bool = False, size: int = GROUP) -> Tensor:
    """E4M3 under a scale for each `size` values (a last group may be shorter); `powers`: scales are powers of two."""
    n = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -n % size))
    groups = padded.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=LEAST["group"]) / E4M3_MAX
    if powers:
        scale = power_above(scale)
    return (e4m3(groups / scale) * scale).flatten(-2)[..., :n]


def power_above(scale: Tensor) -> Tensor:
    """The least power of two that is not below each positive value."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def fp8_static(scale: float) -> Change:
    """E4M3 under a scale that was stored: an FP8 cache."""

    def change(x: Tensor) -> Tensor:
        return e4m3(x.float() / scale).mul_(scale).to(x.dtype)

    return change


def fp8_mass(x: Tensor) -> Tensor:
    """Probabilities in (0, 1] as FlashAttention 3 multiplies them with FP8 values: E4M3 of x * 2^8."""
    return e4m3(x * 256.0) / 256.0


def nvfp4(divisor: float) -> Change:
    """E2M1 under E4M3 scales of 16 values, which are multiples of 1 / divisor (`input_global_scale`)."""

    def change(x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, FP4_GROUP))
        scale = e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX * divisor)
        factor = torch.where(scale > 0, divisor / scale, 0.0)
        return (nearest(2 * groups * factor) / 2 * (scale / divisor)).flatten(-2)

    return change


def q8_0(x: Tensor) -> Tensor:
    """x [..., n] float32 as 8-bit codes times a float16 scale for each 32 values (n a multiple of 32)."""
    blocks = x.unflatten(-1, (-1, 32))
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = torch.round(blocks * torch.where(peak > 0, 127.0 / peak, 0.0))
    return (codes * half(peak / 127.0)).flatten(-2)


def q8_k(x: Tensor) -> Tensor:
    """x [..., n] float32 as 8-bit codes times a float32 scale for each 256 values (n a multiple of 256).

    The value of largest magnitude becomes -127, whatever its sign.
    """
    blocks = x.unflatten(-1, (-1, 256))
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    inverse = torch.where(peak != 0, -127.0 / peak, 0.0)
    codes = torch.round(blocks * inverse).clamp_(max=127)
    return (codes * torch.where(inverse != 0, 1.0 / inverse, 0.0)).flatten(-2)


def q4_0(x: Tensor) -> Tensor:
    """4-bit codes -8..7 times a float16 scale for each 32 values: the value of largest magnitude becomes -8."""
    blocks = x.unflatten(-1, (-1, 32))
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    scale = peak / -8.0
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    codes = torch.floor(blocks * inverse + 8.5).clamp_(0, 15) - 8
    return (codes * half(scale)).flatten(-2)


@lru_cache(maxsize=8)
def hadamard(size: int) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix [size, size] of a power of two (Sylvester's)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def rotated(change: Change, size: int) -> Change:
    """`change` of x turned by Hadamard matrices of `size` values, turned back."""

    def turned(x: Tensor) -> Tensor:
        matrix = hadamard(size).to(x.device)
        inside = change((x.unflatten(-1, (-1, size)) @ matrix).flatten(-2))
        return (inside.unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    return turned
