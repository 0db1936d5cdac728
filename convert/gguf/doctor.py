"""Check a MiniMax-M2 GGUF file and repair float16 overflow without changing its output.

On CUDA llama.cpp keeps the sum of 32 (Q2_K: 16) inputs of a block in float16 for some types: beyond 65504 the result is
NaN. An expert's output does not change when its up projection is divided and its down projection multiplied by the same
power of two; in a GGUF that is the exponent of the block scales alone. Source: llama.cpp ggml-cuda/quantize.cu,
mmq.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmquant.errors import InputError

from ...quantize.ggml.codec import decode
from ...quantize.ggml.types import GGMLType
from ...quantize.overflow import FP16_MAX, rescale_exponents
from ..findings import Finding
from ..models.gguf import GATING
from .finite import SCALES
from .header import GgufFile, GgufTensor
from .reader import GgufSource

AT_RISK = {"Q4_1": 32, "Q5_1": 32, "Q4_K": 32, "Q5_K": 32, "IQ1_S": 32, "Q2_K": 16}  # type -> inputs summed in float16
NORMAL = 2.0**-14  # smallest normal float16
ABSURD = 1e4  # a weight beyond this is no weight of this model
OVERFLOW = "overflow"
BROKEN, DEAD = "holds NaN or infinity", "is all zero"


def check_metadata(source: GgufSource) -> list[Finding]:
    """Keys that make a runtime tokenize, route or stop wrongly."""
    data = source.metadata
    found: list[Finding] = []

    def expect(key: str, expected: object, level: str = "error") -> None:
        if data.get(key) != expected:
            found.append(Finding(level, key, f"{data.get(key)!r}, expected {expected!r}"))

    row = source.geometry.architecture
    expect("tokenizer.ggml.pre", row.gguf.pre)
    expect("tokenizer.ggml.model", "gpt2")
    expect(f"{row.gguf.arch}.expert_gating_func", GATING[row.rules.scoring])
    for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id", "tokenizer.chat_template"):
        if key not in data:
            found.append(Finding("warning", key, "missing"))
    tokens = data.get("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens) != source.geometry.vocab:
        text = f"{len(tokens)} tokens, the embeddings have {source.geometry.vocab} rows"
        found.append(Finding("error", "tokenizer.ggml.tokens", text))
    return found


def check_tensors(source: GgufSource) -> list[Finding]:
    """Dead, non-finite and absurd experts and matrices; one tensor is decoded at a time, an expert at a time."""
    found: list[Finding] = []
    for file in source.files:
        for tensor in file.tensors.values():
            if len(tensor.shape) >= 2:
                found += _check_tensor(file, tensor)
    return found


def _check_tensor(file: GgufFile, tensor: GgufTensor) -> list[Finding]:
    parts: dict[str, list[int]] = {}
    count = tensor.shape[0] if len(tensor.shape) == 3 else 1
    for expert in range(count):
        fault = _fault(_matrix(file, tensor, expert), tensor.kind.block_columns)
        if fault is not None:
            parts.setdefault(fault, []).append(expert)
    found: list[Finding] = []
    for text, experts in parts.items():
        level = "error" if text in (BROKEN, DEAD) else "warning"
        found.append(Finding(level, tensor.name, text, tuple(experts) if count > 1 else ()))
    return found


def _fault(values: Tensor, block: int) -> str | None:
    """What is wrong with one matrix [O, n] stored in blocks of `block` columns."""
    largest = torch.amax(torch.unflatten(values.abs(), -1, (-1, block)), -1)
    if not bool(torch.isfinite(largest).all()):
        return BROKEN
    if not bool(largest.any()):
        return DEAD
    if float(largest.max()) > ABSURD:
        return "holds absurd values"
    return None if block == 1 or bool(largest.all()) else "has blocks that are all zero"


def _rows(file: GgufFile, tensor: GgufTensor, expert: int) -> NDArray[np.uint8]:
    rows = tensor.shape[-2]
    return file.raw(tensor)[expert * rows : (expert + 1) * rows]


def _matrix(file: GgufFile, tensor: GgufTensor, expert: int) -> Tensor:
    return decode(torch.from_numpy(_rows(file, tensor, expert).copy()), tensor.kind, tensor.shape[-1])


def summed(source: GgufSource, layer: int) -> int:
    """How many inputs of a layer's down projection CUDA sums in float16: 16 or 32 (32 where it does not)."""
    return AT_RISK.get(source.tensor_type(f"blk.{layer}.ffn_down_exps.weight"), 32)


def check_overflow(source: GgufSource, sums: Tensor | None) -> list[Finding]:
    """Down projections whose inputs' sums overflow float16 on CUDA; `sums` [L, E]: the largest seen, or None."""
    found: list[Finding] = []
    for layer in range(source.geometry.layers):
        name = f"blk.{layer}.ffn_down_exps.weight"
        kind = source.tensor_type(name)
        if sums is None:
            if kind in AT_RISK and layer == source.geometry.layers - 1:
                text = f"{kind} keeps sums of {AT_RISK[kind]} inputs in float16 on CUDA: measure with --text"
                found.append(Finding("warning", name, text))
            continue
        over = tuple(int(expert) for expert in torch.nonzero(sums[layer] > FP16_MAX).flatten())
        if over:
            level, effect = ("error", "NaN on CUDA") if kind in AT_RISK else ("warning", f"harmless for {kind}")
            reach = f"sums of {summed(source, layer)} inputs reach {float(sums[layer].amax()):.4g}"
            text = f"{reach}, float16 ends at {FP16_MAX:.0f}: {effect}"
            found.append(Finding(level, name, text, over, OVERFLOW))
    return found


def exponents(sums: Tensor) -> dict[tuple[int, int], int]:
    """(layer, expert) -> the power of two by which it is rescaled (`rescale_exponents`)."""
    power = rescale_exponents(sums)
    return {(int(i), int(j)): int(power[i, j]) for i, j in torch.nonzero(power)}


def scaled_blocks(data: NDArray[np.uint8], kind: GGMLType, exponent: int, where: str) -> NDArray[np.uint8]:
    """Rows of one matrix times 2^exponent, by their block scales alone.

    Raises ValueError when a scale would leave float16's normal range, or the type keeps no float16 scale in one piece.
    """
    out = data.copy()
    factor = np.float32(2.0**exponent)
    if kind is GGMLType.F16:
        return _exact(out.view(np.float16), factor, where).view(np.uint8)
    if kind is GGMLType.F32:
        return (out.view(np.float32) * factor).view(np.uint8)
    if kind is GGMLType.BF16:
        words = (out.view(np.uint16).astype(np.uint32) << 16).view(np.float32) * factor
        return (words.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(out.shape)
    blocks = out.reshape(-1, kind.block_bytes)
    if kind is GGMLType.MXFP4:
        moved = blocks[:, 0].astype(np.int32) + exponent
        if moved.min() < 1 or moved.max() > 254:
            raise InputError(f"{where}: an exponent of {kind.name} would leave its range at 2^{exponent}")
        blocks[:, 0] = moved.astype(np.uint8)
        return out
    if kind.name not in SCALES:
        raise InputError(f"{where}: {kind.name} cannot be rescaled in place, quantize this tensor again")
    for offset in SCALES[kind.name]:
        scales = np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16)
        blocks[:, offset : offset + 2] = _exact(scales, factor, where).view(np.uint8)
    return out


def _exact(scales: NDArray[np.float16], factor: np.float32, where: str) -> NDArray[np.float16]:
    expected = scales.astype(np.float32) * factor
    with np.errstate(over="ignore"):
        stored = expected.astype(np.float16)
    leaves = (np.abs(scales.astype(np.float32)) >= NORMAL) & (np.abs(expected) < NORMAL)
    bad = leaves | (stored.astype(np.float32) != expected)
    if bad.any():
        worst = float(np.abs(expected[bad]).max())
        raise InputError(
            f"{where}: {int(bad.sum())} block scales would leave float16's normal range, such as {worst:.3g}"
        )
    return stored


@dataclass(frozen=True)
class Patch:
    """New bytes for one expert's matrix in one file."""

    file: Path
    offset: int
    data: NDArray[np.uint8]


def plan_fix(
    source: GgufSource, powers: dict[tuple[int, int], int]
) -> tuple[list[Patch], dict[tuple[int, int], int], list[Finding]]:
    """The bytes that change, which experts they rescale, and what was left alone.

    Each is proved equal: every decoded value is exactly the old one times the power of two. Raises ValueError when an
    expert whose type is at risk cannot be rescaled; one whose type is harmless is then left alone.
    """
    patches: list[Patch] = []
    done: dict[tuple[int, int], int] = {}
    left: list[Finding] = []
    for (layer, expert), exponent in sorted(powers.items()):
        try:
            patches += _rescaled_expert(source, layer, expert, exponent)
            done[layer, expert] = exponent
        except ValueError as error:
            name = f"blk.{layer}.ffn_down_exps.weight"
            if source.tensor_type(name) in AT_RISK:
                raise
            left.append(Finding("warning", name, f"left alone, its type needs no rescaling ({error})", (expert,)))
    return patches, done, left


def _rescaled_expert(source: GgufSource, layer: int, expert: int, exponent: int) -> list[Patch]:
    patches: list[Patch] = []
    for stem, power in (("ffn_up_exps", -exponent), ("ffn_down_exps", exponent)):
        file, tensor = source.locate(f"blk.{layer}.{stem}.weight")
        where = f"blk.{layer}.{stem}.weight expert {expert}"
        old = _rows(file, tensor, expert)
        new = scaled_blocks(old, tensor.kind, power, where)
        before, after = (decode(torch.from_numpy(part.copy()), tensor.kind, tensor.shape[-1]) for part in (old, new))
        if not torch.equal(before * 2.0**power, after):
            raise InputError(f"{where}: 2^{power} does not decode to the same weights, nothing was changed")
        patches.append(Patch(file.path, tensor.offset + expert * old.nbytes, new))
    return patches
