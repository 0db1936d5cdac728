"""Emulate how llama.cpp's CPU backend rounds the activations of each matrix. Off by default.

A GGUF matrix is multiplied by activations in the type that goes with its own: blocks of 32 or 256 values of 8 bits,
float16 or bfloat16; keys, values and queries are float16. A model that is no GGUF counts as its BF16 conversion.
Source: ggml-cpu.c (`vec_dot_type` of each type), ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q8_K_ref).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, TOKEN_EMBD
from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from .forward import CACHE, EXACT, HEAD_INPUT, Change, Rounding

BF16 = "BF16"


def half(x: Tensor) -> Tensor:
    """Rounded to float16, in x's dtype."""
    return x.to(torch.float16).to(x.dtype)


def brain(x: Tensor) -> Tensor:
    """Rounded to bfloat16, in x's dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


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


SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")  # blocks of 32; the others have blocks of 256
PLAIN: dict[str, Change | None] = {"F32": None, "F16": half, BF16: brain}


def change_of(kind: str) -> Change | None:
    """What happens to the inputs of a matrix of this ggml type; None: nothing."""
    return PLAIN[kind] if kind in PLAIN else q8_0 if kind in SMALL else q8_k


def layer_rounding(source: Source, layer: int) -> Rounding:
    """What llama.cpp does to the inputs of each matrix of a layer."""
    tensors = {name: role[0] for name, role in ATTENTION_TENSORS.items()} | EXPERT_TENSORS
    found = {role: change_of(source.ggml_type(f"blk.{layer}.{name}.weight") or BF16) for name, role in tensors.items()}
    return {CACHE: half} | {role: change for role, change in found.items() if change is not None}


def head_rounding(source: Source) -> Rounding:
    """What llama.cpp does to the input of the head."""
    kind = source.ggml_type(OUTPUT) or source.ggml_type(TOKEN_EMBD) or BF16  # tied embeddings are the head as well
    change = change_of(kind)
    return EXACT if change is None else {HEAD_INPUT: change}


def as_converted(source: Source, weights: LayerWeights) -> LayerWeights:
    """The layer as its GGUF would hold it: matrices of what is no GGUF rounded to bfloat16, all else untouched."""
    if source.ggml_type(TOKEN_EMBD) is not None:
        return weights
    return replace(
        weights, **{name: brain(getattr(weights, name)) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    )
