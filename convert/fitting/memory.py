"""Bytes beside the weights: KV cache, compute buffers, staging of experts, what engines keep for themselves.

llama.cpp's cache and compute buffer are its own arithmetic (tests hold them against the library's report); what is said
of CUDA and of vLLM are estimates from public measurements: vLLM takes 3 to 4.5 GiB a card beyond weights and cache,
llama.cpp 0.6 GiB a card for its CUDA context.
"""

from __future__ import annotations

from ..models.geometry import Geometry

GIB = 1 << 30
FREE = 1 * GIB  # what stays free on every device
UBATCH = 512  # llama.cpp's default micro-batch
CUDA_RUNTIME, HOST_RUNTIME = int(0.6 * GIB), 2 * GIB
VLLM_SHARE = 0.92  # --gpu-memory-utilization, vLLM's default
VLLM_ACTIVATIONS, VLLM_RUNTIME = int(2.5 * GIB), 1 * GIB
MLX_COMPUTE = 2 * GIB
CONTEXTS = tuple(k * 1024 for k in (8, 16, 32, 64, 96, 128, 192))
CACHES = {"f16": 64, "fp8": 32, "q8_0": 34, "q4_0": 18}  # bytes of 32 elements; ggml's blocks have scales
KV_PAD = 256  # llama.cpp allots the cache in steps of so many tokens


def kv_table(g: Geometry) -> dict[str, int]:
    """KV cache bytes of one token, whole model, by cache type."""
    return {name: g.kv_bytes_per_token(size) for name, size in CACHES.items()}


def kv_bytes(g: Geometry, context: int, cache: str) -> int:
    """KV cache of one sequence, whole model."""
    return -(-context // KV_PAD) * KV_PAD * kv_table(g)[cache]


def compute_bytes(g: Geometry, context: int, ubatch: int = UBATCH) -> int:
    """llama.cpp's compute buffer with flash attention: the larger of head and experts, and the mask of the cache.

    Head: logits and five rows of hidden size, float32, of each token of a micro-batch. Mask: float16, token by cache.
    """
    head = 4 * (g.vocab + 5 * g.hidden)
    experts = 4 * g.experts_per_token * (3 * g.expert_width + 2 * g.hidden)
    return ubatch * (max(head, experts) + 2 * (-(-context // KV_PAD) * KV_PAD))


def staging_bytes(expert_layer: int) -> int:
    """Room on the card for experts that lie in RAM: one of a layer's three matrices at a time is copied for prompts."""
    return -(-expert_layer // 3)


def contexts_of(g: Geometry) -> tuple[int, ...]:
    """The contexts that are tried, small to large: those up to the model's maximum, or that alone."""
    return tuple(c for c in CONTEXTS if c <= g.max_context) or (g.max_context,)
