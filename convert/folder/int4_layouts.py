"""Layouts of an INT4 matrix (compressed-tensors, AWQ GEMM, GPTQ v1) and their config.json entries.

Names are the release's (w1, w2, w3): engines skip others without a word. AWQ and GPTQ keep float16 scales, which
engines cast to bfloat16 when they serve in it: scales are exact in both or refused. Layouts: vLLM 0.33 auto_awq.py and
auto_gptq.py. GPTQ is symmetric, v1: zero points stored minus one (7), ignored by the kernels but read for their shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.integer.grid import IntWeight, map_parts
from ...quantize.integer.pack import pack_awq, pack_gptq, pack_gptq_zeros, pack_rows, pack_zeros_ct
from ..checkpoints.batches import to_host
from . import compressed_tensors as ct
from .writer import TensorSpec

PACKED_AT_ONCE = 16  # matrices: 1 GB of temporaries at M2.7's size
FORMATS = ("compressed-tensors", "awq", "gptq")
MANIFEST_FORMAT = {"compressed-tensors": "compressed-tensors", "awq": "awq", "gptq": "safetensors"}


def check_format(format: str, bits: int, attention: str, symmetric: bool) -> None:
    """ValueError for what a format cannot hold: AWQ is 4-bit, GPTQ symmetric, and neither has FP8 beside it."""
    if format == "compressed-tensors":
        return
    if attention.startswith("fp8"):
        raise InputError(
            f"format {format}: attention {attention}, expected bf16 or int4 (compressed-tensors holds FP8 too)"
        )
    if format == "awq" and bits != 4:
        raise InputError(f"format awq: {bits} bits, expected 4")
    if format == "gptq" and not symmetric:
        raise InputError("format gptq: asymmetric, expected symmetric (vLLM reads no other)")


def matrix_specs(
    format: str, name: str, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool
) -> Iterator[TensorSpec]:
    """Tensors of one quantized matrix [O, I] named `name` (without .weight)."""
    rows, cols = shape
    groups = 1 if group_size == -1 else cols // group_size
    per_word = 32 // bits
    if format == "compressed-tensors":
        yield from ct.int_specs(name, shape, bits, group_size, symmetric)
        return
    if rows % per_word or cols % per_word:
        raise InputError(f"{name}: {rows} x {cols}, expected multiples of {per_word} for format {format}")
    packed = (cols, rows // per_word) if format == "awq" else (cols // per_word, rows)
    yield TensorSpec(name + ".qweight", "I32", packed)
    yield TensorSpec(name + ".qzeros", "I32", (groups, rows // per_word))
    yield TensorSpec(name + ".scales", "F16", (groups, rows))
    if format == "gptq":
        yield TensorSpec(name + ".g_idx", "I32", (cols,))


def matrix_tensors(format: str, name: str, weight: IntWeight) -> dict[str, Tensor]:
    """The values of `matrix_specs`."""
    return batch_tensors(format, [name], map_parts(weight, lambda part: part.unsqueeze(0)))


def batch_tensors(format: str, names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    """The values of `matrix_specs` of E matrices [E, O, I], on the CPU; packed where they lie, copied together."""
    found = {}
    for start in range(0, len(names), PACKED_AT_ONCE):
        some = names[start : start + PACKED_AT_ONCE]
        part = map_parts(weight, lambda values, start=start: values[start : start + PACKED_AT_ONCE])
        packed = _pack_quantized(part) if format == "compressed-tensors" else _pack_half(format, some, part)
        for suffix, values in packed.items():
            found |= {name + suffix: value for name, value in zip(some, to_host(values), strict=True)}
    return found


def _pack_half(format: str, names: list[str], weight: IntWeight) -> dict[str, Tensor]:
    """AWQ or GPTQ: words along outputs or inputs, zero points, float16 scales."""
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales, dtype=torch.int8)
    each = zip(names, weight.scales, strict=True)
    scales = torch.stack([half_scales(name, one) for name, one in each]).mT.contiguous()
    if format == "awq":
        return {".qweight": pack_awq(weight.codes), ".qzeros": pack_awq(zeros), ".scales": scales}
    groups = torch.arange(weight.codes.shape[-1], dtype=torch.int32) // weight.group_size
    return {
        ".qweight": pack_gptq(weight.codes, weight.bits),
        ".qzeros": pack_gptq_zeros(zeros, weight.bits),
        ".scales": scales,
        ".g_idx": groups.expand(len(names), -1),
    }


def _pack_quantized(weight: IntWeight) -> dict[str, Tensor]:
    """pack-quantized: words along the inputs, bfloat16 scales, shape, zero points."""
    tensors = {
        ".weight_packed": pack_rows(weight.codes, weight.bits),
        ".weight_scale": weight.scales.to(torch.bfloat16),
        ".weight_shape": torch.tensor(weight.codes.shape[1:], dtype=torch.int64).expand(len(weight.codes), -1),
    }
    if weight.zeros is not None:
        tensors[".weight_zero_point"] = pack_zeros_ct(weight.zeros, weight.bits)
    return tensors


def half_scales(name: str, scales: Tensor) -> Tensor:
    """Scales as float16. ValueError when one that matters is too large, or so small that it loses more than 2^-9.

    A group a thousand times smaller than the others of its matrix does not matter.
    """
    half = scales.to(torch.float16)
    size = scales.abs()
    off = (half.float() - scales).abs() > torch.maximum(size, size.median() / 1024) * 2.0**-9
    if bool(off.any()) or not bool(torch.isfinite(half).all()):
        worst = float(scales[off | ~torch.isfinite(half)].abs().min())
        raise InputError(f"{name}: scale {worst:.3g} does not fit float16; use format compressed-tensors")
    return half


def awq_config(group_size: int, skipped: list[str]) -> dict[str, Any]:
    """quantization_config of an AWQ folder; `skipped`: substrings of module names left unquantized."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped,
    }


def gptq_config(bits: int, group_size: int, attention: str) -> dict[str, Any]:
    """quantization_config of a GPTQ folder: desc_act false, symmetric, v1; attention skipped by a `dynamic` rule."""
    skip: dict[str, Any] = {} if attention == "int4" else {r"-:.*self_attn.*": {}}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "damp_percent": 0.03,
        "true_sequential": False,
        "dynamic": skip,
    }


def other_config(format: str, bits: int, group_size: int, attention: str) -> dict[str, Any]:
    """quantization_config of the two formats that are not compressed-tensors.

    The router's name is listed whole ("block_sparse_moe.gate"): engines match substrings of module names.
    """
    if format == "gptq":
        return gptq_config(bits, group_size, attention)
    attention_names = [] if attention == "int4" else ["self_attn"]
    return awq_config(group_size, ["lm_head", "embed_tokens", "block_sparse_moe.gate", *attention_names])
