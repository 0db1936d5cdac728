"""Names, shapes and dtypes of the tensors in which a scheme stores one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .quantization_config import Scheme
from .storage import Parts
from .store import TensorInfo

BESIDE = {"weight_shape", "qzeros", "g_idx", "weight_g_idx"}

Part = tuple[str, tuple[int, ...], tuple[str, ...]]  # suffix, shape, dtypes


@dataclass(frozen=True)
class Stored:
    """One matrix: its logical shape, its scheme (None: plain) and the tensors it is made of, by suffix."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    parts: dict[str, TensorInfo]


def parts_of(scheme: Scheme, shape: tuple[int, int]) -> list[Part]:
    """The tensors that a scheme calls for, with shapes and dtypes."""
    outputs, inputs = shape
    size = inputs if scheme.group == -1 else scheme.group
    groups, floats = ceil(inputs / size), ("BF16", "F16", "F32")
    words = ceil(inputs * scheme.bits / 32)
    if scheme.format in ("awq", "gptq"):
        packed = (inputs, outputs * 4 // 32) if scheme.format == "awq" else (words, outputs)
        zeros = (groups, outputs * scheme.bits // 32)
        parts: list[Part] = [("qweight", packed, ("I32",)), ("scales", (groups, outputs), floats)]
        needed = (scheme.format == "awq" and not scheme.symmetric) or (scheme.format == "gptq" and not scheme.symmetric)
        parts += [("qzeros", zeros, ("I32",))] if needed else []
        return parts + ([("g_idx", (inputs,), ("I32",))] if scheme.act_order else [])
    if scheme.format == "pack-quantized":
        parts = [("weight_packed", (outputs, words), ("I32",)), ("weight_scale", (outputs, groups), floats)]
        zeros = (ceil(outputs * scheme.bits / 32), groups)
        return parts if scheme.symmetric else [*parts, ("weight_zero_point", zeros, ("I32",))]
    scales = (outputs, groups)
    if scheme.block is not None:
        scales = (ceil(outputs / scheme.block[0]), ceil(inputs / scheme.block[1]))
    codes = "F8_E4M3" if scheme.format == "float-quantized" else "I8"
    return [("weight", shape, (codes,)), ("weight_scale", scales, floats)]


def known_parts(stored: Stored) -> list[TensorInfo]:
    """The tensors of a matrix that its scheme has, and those beside them that engines do not look at."""
    suffixes = {"weight"} if stored.scheme is None else {p[0] for p in parts_of(stored.scheme, stored.shape)} | BESIDE
    return [info for suffix, info in stored.parts.items() if suffix in suffixes]


def fits(scheme: Scheme, shape: tuple[int, int], parts: Parts) -> bool:
    """Whether the packed tensors of a scheme are there in its shapes."""
    return all(
        suffix in parts and (suffix == "weight_scale" or parts[suffix].shape == wanted)
        for suffix, wanted, _ in parts_of(scheme, shape)
    )
