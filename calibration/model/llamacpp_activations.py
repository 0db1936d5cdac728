"""Emulate how llama.cpp's CPU backend rounds the activations of each matrix. Off by default.

A GGUF matrix is multiplied by activations in the type that goes with its own: blocks of 32 or 256 values of 8 bits,
float16 or bfloat16; keys, values and queries are float16. A model that is no GGUF counts as its BF16 conversion.
Source: ggml-cpu.c (`vec_dot_type` of each type), ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q8_K_ref).
"""

from __future__ import annotations

from dataclasses import replace

from ...convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, TOKEN_EMBD
from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from .forward import EXACT, HEAD_INPUT, KEY, QUERY, VALUE, Change, Rounding
from .roundings import brain, half, q4_0, q8_0, q8_k, rotated

BF16 = "BF16"


SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")  # blocks of 32; the others have blocks of 256
PLAIN: dict[str, Change | None] = {"F32": None, "F16": half, BF16: brain}


def change_of(kind: str) -> Change | None:
    """What happens to the inputs of a matrix of this ggml type; None: nothing."""
    return PLAIN[kind] if kind in PLAIN else q8_0 if kind in SMALL else q8_k


CACHES: dict[str, Change] = {"16bit": half, "q8_0": q8_0, "q4_0": q4_0}
TURNED = 64  # values: what a quantized cache keeps is turned by Hadamard matrices where a head is a multiple of it


def cache_rounding(kind: str, head_dim: int) -> Rounding:
    """What attention multiplies under a cache of this type: a quantized one's queries are Q8_0, as ggml pairs them."""
    if kind == "16bit":
        return dict.fromkeys((QUERY, KEY, VALUE), half)
    keys, values = head_dim & -head_dim, TURNED  # the largest power of two that divides a head, and the smallest turned
    if head_dim % TURNED:
        return {QUERY: q8_0, KEY: CACHES[kind], VALUE: CACHES[kind]}
    return {QUERY: rotated(q8_0, keys), KEY: rotated(CACHES[kind], keys), VALUE: rotated(CACHES[kind], values)}


def layer_rounding(source: Source, layer: int, cache: str = "16bit") -> Rounding:
    """What llama.cpp does to the inputs of each matrix of a layer, and to keys, values and queries."""
    tensors = {name: role[0] for name, role in ATTENTION_TENSORS.items()} | EXPERT_TENSORS
    found = {role: change_of(source.ggml_type(f"blk.{layer}.{name}.weight") or BF16) for name, role in tensors.items()}
    inputs = {role: change for role, change in found.items() if change is not None}
    return {**cache_rounding(cache, source.geometry.head_dim), **inputs}


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
