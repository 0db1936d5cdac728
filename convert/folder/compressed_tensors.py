"""The compressed-tensors format for vLLM and SGLang: stored tensors and config.json entries per scheme.

Layouts as the engines' loaders take them (compressed-tensors 0.17-0.20): float-quantized FP8 with 128x128 tiles or a
scale per output channel; pack-quantized integers with bfloat16 group scales. Targets are regular expressions that match
both engines' prefixes (vLLM: mlp.experts, SGLang: block_sparse_moe.experts); vLLM would ignore exact expert names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from .writer import TensorSpec

IGNORE = ("lm_head", r"re:.*block_sparse_moe.gate$", r"re:.*mlp\.gate$", "re:.*embed_tokens$")
ATTENTION_TARGET = "re:.*self_attn.*"
EXPERTS_TARGET = r"re:.*experts\..*"
VERSION = "0.17.0"  # the oldest compressed-tensors whose reader takes these files (pinned by vLLM 0.33)

FP8_BLOCK, FP8_CHANNEL, INT = "FP8_BLOCK", "FP8_DYNAMIC", "W4A16"


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    base = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        "zp_dtype": None,
    }
    return {**base, **more}


def fp8_block_group(targets: list[str], tile: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """config group: e4m3 weights in tiles, activations quantized per token and 128 channels when they arrive."""
    return {
        "format": "float-quantized",
        "input_activations": _arguments(8, "float", "group", dynamic=True, group_size=tile[1]),
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(8, "float", "block", block_structure=list(tile)),
    }


def fp8_channel_group(targets: list[str]) -> dict[str, Any]:
    """config group: e4m3 weights with a scale per output channel, activations per token."""
    return {
        "format": "float-quantized",
        "input_activations": _arguments(8, "float", "token", dynamic=True),
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(8, "float", "channel"),
    }


def int_group(targets: list[str], bits: int, group_size: int, symmetric: bool = True) -> dict[str, Any]:
    """config group: packed integers with a scale per `group_size` inputs (-1: per output channel)."""
    strategy, size = ("channel", None) if group_size == -1 else ("group", group_size)
    zero = {} if symmetric else {"symmetric": False, "zp_dtype": "torch.int8"}
    return {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(bits, "int", strategy, group_size=size, **zero),
    }


def quantization_config(
    groups: Mapping[str, dict[str, Any]], format: str, ignore: tuple[str, ...] = IGNORE, kv_cache: bool = False
) -> dict[str, Any]:
    """The quantization_config of config.json; `format` is the top-level one, each group names its own."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "config_groups": dict(groups),
        "format": format,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": scheme if kv_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": VERSION,
    }


def fp8_block_specs(
    name: str, shape: tuple[int, int], tile: tuple[int, int], scale_dtype: str = "F32"
) -> Iterator[TensorSpec]:
    """Tensors of a matrix [O, I]: codes and a scale per tile. Float32 scales keep the release's values exactly."""
    yield TensorSpec(name + ".weight", "F8_E4M3", shape)
    yield TensorSpec(name + ".weight_scale", scale_dtype, (ceil(shape[0] / tile[0]), ceil(shape[1] / tile[1])))


def fp8_channel_specs(name: str, shape: tuple[int, int], scale_dtype: str = "BF16") -> Iterator[TensorSpec]:
    """Tensors of a matrix [O, I]: codes and a scale per output channel."""
    yield TensorSpec(name + ".weight", "F8_E4M3", shape)
    yield TensorSpec(name + ".weight_scale", scale_dtype, (shape[0], 1))


def cache_specs(keys: str, values: str) -> Iterator[TensorSpec]:
    """Scales of an FP8 KV cache, under the names that both engines read; `keys`, `values`: names of k_proj, v_proj."""
    yield TensorSpec(keys + ".k_scale", "F32", (1,))
    yield TensorSpec(values + ".v_scale", "F32", (1,))


def int_specs(
    name: str, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool = True
) -> Iterator[TensorSpec]:
    """Tensors of a matrix [O, I]: packed words along I, bfloat16 scales, the shape, zero points packed along O."""
    rows, cols = shape
    groups = 1 if group_size == -1 else cols // group_size
    yield TensorSpec(name + ".weight_packed", "I32", (rows, ceil(cols * bits / 32)))
    yield TensorSpec(name + ".weight_scale", "BF16", (rows, groups))
    yield TensorSpec(name + ".weight_shape", "I64", (2,))
    if not symmetric:
        yield TensorSpec(name + ".weight_zero_point", "I32", (ceil(rows * bits / 32), groups))
