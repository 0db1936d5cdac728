"""Estimate whether a model fits 2x A100-80GB, or one 24 GB card with system RAM.

Sizes in bytes. Formulas and constants: KV cache of one sequence, activations and runtime as measured by others
(vLLM: 3-4.5 GiB a GPU beyond weights and cache; llama.cpp: ubatch x vocabulary x 4 bytes, 0.6 GiB CUDA context).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fitting.weights import Weights
from .models.geometry import Geometry

GIB = 1 << 30
A100 = int(79.15 * GIB)
CARD_24 = int(23.5 * GIB)
VLLM_UTILIZATION = 0.92
VLLM_ACTIVATIONS, VLLM_RUNTIME = int(2.5 * GIB), 1 * GIB
CUDA_RUNTIME, HOST_RUNTIME = int(0.6 * GIB), 2 * GIB
UBATCH = 512
HOST_SIZES = (32, 64, 96, 128, 192, 256, 384)
WANTED_CONTEXT = 32768
TIGHT = 0.03  # a margin below this share of the device is "tight"


@dataclass(frozen=True)
class Device:
    """One row of a budget; the parts add up to `used`."""

    name: str
    usable: int
    weights: int
    kv: int
    compute: int
    runtime: int

    @property
    def margin(self) -> int:
        """Bytes that stay free; negative: what is missing."""
        return self.usable - self.weights - self.kv - self.compute - self.runtime

    def row(self) -> dict[str, Any]:
        """The device's line of a budget in the manifest."""
        return {
            "device": self.name,
            "usable": self.usable,
            "weights": self.weights,
            "kv": self.kv,
            "compute": self.compute,
            "runtime": self.runtime,
            "used": self.usable - self.margin,
            "margin": self.margin,
        }


def verdict(devices: list[Device]) -> str:
    """yes, tight or no by the smallest margin."""
    if any(d.margin < 0 for d in devices):
        return "no"
    return "tight" if any(d.margin < TIGHT * d.usable for d in devices) else "yes"


def kv_table(g: Geometry) -> dict[str, int]:
    """KV cache bytes of one token, whole model, by cache type (ggml blocks of 32: q8_0 34 bytes, q4_0 18)."""
    sizes = {"f16": 64, "fp8": 32, "q8_0": 34, "q4_0": 18}
    return {name: g.kv_bytes_per_token(size) for name, size in sizes.items()}


def targets(
    artifact: str, format: str, entry: str, weights: Weights, g: Geometry, cache: str = "f16"
) -> list[dict[str, Any]]:
    """The two targets of every manifest, in its schema's form, marked `estimated`; `cache`: type of the KV cache.

    What does not fit has no context and no command.
    """
    if format == "gguf":
        return [_llama_a100(artifact, entry, weights, g), _llama_card(artifact, entry, weights, g)]
    return [_vllm_a100(artifact, entry, weights, g, cache), _vllm_card(artifact, entry, weights, g, cache)]


def _target(
    id: str,
    artifact: str,
    engine: str,
    hardware: dict[str, Any],
    devices: list[Device],
    context: int,
    *,
    launch: dict[str, Any],
    cache: str = "f16",
    **more: object,
) -> dict[str, Any]:
    fits = verdict(devices) if context else "no"
    return {
        "id": id,
        "artifact": artifact,
        "engine": engine,
        "hardware": hardware,
        "fits": fits,
        "context_tokens": context if fits != "no" else 0,
        "kv_cache_type": cache,
        "parallel_sequences": 1,
        "budget": [d.row() for d in devices],
        "basis": "estimated",
        "launch": launch if fits != "no" else {"argv": []},
        **more,
    }


def _context(free: int, per_token: int, g: Geometry, at_most: int | None = None) -> int:
    """Tokens whose cache fits into `free` bytes, in steps of 256; 0 when not even one step does."""
    fitting = max(0, free // max(per_token, 1))
    return min(g.max_context, at_most or g.max_context, fitting - fitting % 256)


def _vllm(
    artifact: str, entry: str, weights: Weights, g: Geometry, cache: str, count: int, memory: int, id: str
) -> dict[str, Any]:
    usable = int(memory * VLLM_UTILIZATION)
    per_token = kv_table(g)[cache] // count
    part = -(-weights.total // count)
    context = _context(usable - part - VLLM_ACTIVATIONS - VLLM_RUNTIME, per_token, g)
    devices = [
        Device(f"gpu{i}", usable, part, context * per_token, VLLM_ACTIVATIONS, VLLM_RUNTIME) for i in range(count)
    ]
    argv = ["vllm", "serve", entry, "--tensor-parallel-size", str(count), "--max-model-len", str(context)]
    name = "A100-80GB" if count == 2 else "24GB card"
    return _target(
        id,
        artifact,
        "vllm",
        {"gpus": [{"name": name, "count": count, "memory": memory, "usable": usable}], "host_ram": 64 * 10**9},
        devices,
        context,
        placement={"tensor_parallel": count, "gpu_memory_utilization": VLLM_UTILIZATION},
        launch={"argv": [*argv, "--gpu-memory-utilization", str(VLLM_UTILIZATION)]},
        cache=cache,
    )


def _vllm_a100(artifact: str, entry: str, weights: Weights, g: Geometry, cache: str) -> dict[str, Any]:
    return _vllm(artifact, entry, weights, g, cache, 2, A100, "2xA100-80GB")


def _vllm_card(artifact: str, entry: str, weights: Weights, g: Geometry, cache: str) -> dict[str, Any]:
    return _vllm(artifact, entry, weights, g, cache, 1, CARD_24, "24GB-GPU+RAM")


def _compute(g: Geometry) -> int:
    return UBATCH * g.vocab * 4 + 11 * (1 << 20)


def _llama_argv(entry: str, context: int, cpu_layers: int) -> list[str]:
    argv = ["llama-server", "-m", entry, "-c", str(context), "-ngl", "99", "-fa", "on", "--jinja"]
    return [*argv, "--n-cpu-moe", str(cpu_layers)] if cpu_layers else argv


def _llama_a100(artifact: str, entry: str, weights: Weights, g: Geometry) -> dict[str, Any]:
    per_token, part = kv_table(g)["f16"] // 2, -(-weights.total // 2)
    context = _context(A100 - part - _compute(g) - CUDA_RUNTIME, per_token, g, at_most=65536)
    devices = [Device(f"gpu{i}", A100, part, context * per_token, _compute(g), CUDA_RUNTIME) for i in range(2)]
    hardware = {
        "gpus": [{"name": "A100-80GB", "count": 2, "memory": A100, "usable": A100}],
        "host_ram": 64 * 10**9,
    }
    return _target(
        "2xA100-80GB",
        artifact,
        "llama.cpp",
        hardware,
        devices,
        context,
        placement={"n_cpu_moe": 0},
        launch={"argv": _llama_argv(entry, context, 0)},
    )


def _llama_card(artifact: str, entry: str, weights: Weights, g: Geometry) -> dict[str, Any]:
    context = min(g.max_context, WANTED_CONTEXT)
    kv, compute = context * kv_table(g)["f16"], _compute(g)
    free = CARD_24 - weights.resident - kv - compute - CUDA_RUNTIME
    on_card = 0
    for size in reversed(weights.expert_layer):  # --n-cpu-moe keeps the first layers' experts on the CPU
        if size > free:
            break
        free -= size
        on_card += 1
    cpu_layers = len(weights.expert_layer) - on_card
    in_ram = sum(weights.expert_layer[:cpu_layers])
    card = Device("gpu0", CARD_24, weights.resident + weights.experts - in_ram, kv, compute, CUDA_RUNTIME)
    host_gb = next((s for s in HOST_SIZES if s * 10**9 >= in_ram + HOST_RUNTIME), HOST_SIZES[-1])
    host = Device("host", host_gb * 10**9, in_ram, 0, 0, HOST_RUNTIME)
    hardware = {
        "gpus": [{"name": "24GB card", "count": 1, "memory": 24 * GIB, "usable": CARD_24}],
        "host_ram": host_gb * 10**9,
    }
    return _target(
        "24GB-GPU+RAM",
        artifact,
        "llama.cpp",
        hardware,
        [card, host],
        context,
        placement={"n_cpu_moe": cpu_layers},
        launch={"argv": _llama_argv(entry, context, cpu_layers)},
    )
