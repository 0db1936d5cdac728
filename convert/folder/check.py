"""Read a quantized folder back as an engine would, after it was written.

Engines load what they find and keep quiet about the rest: experts under other names, or schemes that a name does not
match, leave weights uninitialised. So: every tensor has its place and every place its tensor, both engines find the
same scheme for every layer, and no matrix is zero or holds NaN or infinity.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..checkpoints.batches import batches
from ..checkpoints.finite import check_finite
from ..checkpoints.quantized_folder import QuantizedFolder
from ..checkpoints.storage import words
from ..checkpoints.store import LocalFolder
from ..formats.skip_lists import SGLANG, VLLM
from ..models.names import ATTENTION, PROJECTIONS, TensorNames
from ..models.shapes import global_shapes, is_mtp, plain_shapes
from ..source import Source

LARGEST_ERROR = 0.5  # of a matrix, relative: INT4 of anything is near 0.1, noise is near 1.4


def check_folder(
    folder: Path, source: Source | None = None, samples: int = 4, device: torch.device | str = "cpu"
) -> int:
    """Check all tensors; returns how many matrices were read. InputError with the first fault.

    With `source`, `samples` experts of every layer are also compared with the originals. `device` decodes them.
    """
    found = QuantizedFolder(LocalFolder(folder))
    check_headers(found)
    for layer in range(found.geometry.layers):
        check_written_layer(found, layer, source, samples, device)
    check_outside(found, list(global_shapes(found.geometry)))
    return len(found.matrices)


def check_outside(found: QuantizedFolder, names: list[str]) -> None:
    """Embeddings, final norm or head hold no NaN and no infinity."""
    for name in names:
        if name in found.tensors or name.removesuffix(".weight") in found.matrices:
            check_finite(found.read(name), f"{found.label}: {name}")


def check_headers(found: QuantizedFolder) -> None:
    """What names, shapes and config.json say: every tensor has its place, both engines find the same schemes."""
    found.validate()
    if found.warnings:
        raise InputError(found.warnings[0])
    check_places(found)
    for layer in range(found.geometry.layers):
        check_engines(found, layer)
        _check_cache_names(found, layer)


def check_written_layer(
    found: QuantizedFolder, layer: int, source: Source | None, samples: int, device: torch.device | str
) -> None:
    """What one layer's values are; see `check_folder`. Nothing outside the layer is read."""
    check_layer(found, layer, device)
    _check_cache_scales(found, layer)
    for name, _ in plain_shapes(found.geometry, layer):
        if name in found.tensors or name.removesuffix(".weight") in found.matrices:
            check_finite(found.read(name), f"{found.label}: {name}")
    if source is not None:
        compare_layer(found, source, samples, layer)


def check_places(found: QuantizedFolder) -> None:
    """No tensor beyond those that an engine asks for: an unknown one is fatal in vLLM, or is skipped."""
    known = set(global_shapes(found.geometry))
    for layer in range(found.geometry.layers):
        known |= {name for name, _ in plain_shapes(found.geometry, layer)}
        known |= set(_cache_names(found.names, layer))
    for stored in found.matrices.values():
        stacked = found.book.stacked
        known |= {info.name if stacked else f"{stored.name}.{suffix}" for suffix, info in stored.parts.items()}
    strange = sorted(n for n in found.tensors if n not in known and not is_mtp(n, found.geometry))
    if strange:
        raise InputError(f"{found.label}: {strange[0]} has no place in the model")


def _cache_names(names: TensorNames, layer: int) -> list[str]:
    return [f"{names.attention(layer, p)}.{s}" for p, s in (("k_proj", "k_scale"), ("v_proj", "v_scale"))]


def _check_cache_names(found: QuantizedFolder, layer: int) -> None:
    """A kv_cache_scheme comes with scales for every layer's keys and values, and none are there without it."""
    expected = bool(found.quantization.get("kv_cache_scheme"))
    for name in _cache_names(found.names, layer):
        if (name in found.tensors) != expected:
            state = "is there without" if not expected else "is missing beside"
            raise InputError(f"{found.label}: {name} {state} a kv_cache_scheme in config.json")


def _check_cache_scales(found: QuantizedFolder, layer: int) -> None:
    """They are positive, and one number each."""
    for name in (name for name in _cache_names(found.names, layer) if name in found.tensors):
        scale = found.read(name)
        if scale.numel() != 1 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InputError(f"{found.label}: {name} is {scale.flatten()[:4].tolist()}, expected one positive number")


def check_engines(found: QuantizedFolder, layer: int) -> None:
    """vLLM and SGLang look experts up under names of their own and take one scheme for a layer's experts."""
    engines = [engine for engine in (VLLM, SGLANG) if engine in found.book.engines]
    if not engines:
        return
    expected = found.matrices[found.names.expert(layer, 0, "gate")].scheme
    for projection in PROJECTIONS:
        name = found.names.expert(layer, 0, projection)
        for engine in engines:
            scheme = found.book.reading(name, engine)
            if scheme != expected:
                said = f"is {words(scheme)} by config.json as {engine} reads it"
                raise InputError(f"{found.label}: {name} {said}, its tensors are {words(expected)}")
    for expert in range(found.geometry.experts):
        for projection in PROJECTIONS:
            scheme = found.matrices[found.names.expert(layer, expert, projection)].scheme
            if scheme != expected:
                name = found.names.expert(layer, expert, projection)
                raise InputError(f"{found.label}: {name} is {words(scheme)}, expert 0 of its layer {words(expected)}")


def check_layer(found: QuantizedFolder, layer: int, device: torch.device | str) -> None:
    """Attention one by one, experts in stacks."""
    for projection in ATTENTION:
        name = found.names.attention(layer, projection)
        _check_values(found, [name], found.dequantize(name, device).unsqueeze(0))
    for projection in PROJECTIONS:
        for part in batches(found.geometry.experts):
            names = [found.names.expert(layer, expert, projection) for expert in part]
            _check_values(found, names, found.read_experts(layer, projection, part, device, torch.float32))


def _check_values(found: QuantizedFolder, names: list[str], values: Tensor) -> None:
    """No matrix [O, I] of the stack [n, O, I] is zero throughout or holds NaN or infinity."""
    largest = [float(most) for most in values.abs().amax((1, 2)).cpu()]  # NaN stays NaN
    for index, (name, most) in enumerate(zip(names, largest, strict=True)):
        if not math.isfinite(most):
            check_finite(values[index], f"{found.label}: {name}")
        if most == 0:
            raise InputError(f"{found.label}: {name} is zero throughout")


def compare_layer(found: QuantizedFolder, source: Source, samples: int, layer: int) -> None:
    """Some experts of a layer against the originals, up to a scale per row or column (equalization moves those)."""
    experts = found.geometry.experts
    chosen = sorted({round(i * (experts - 1) / max(1, samples - 1)) for i in range(samples)})
    for expert in chosen:
        for projection in PROJECTIONS:
            name = found.names.expert(layer, expert, projection)
            error = difference(found.dequantize(name), source.read(name + ".weight"))
            if error > LARGEST_ERROR:
                raise InputError(f"{found.label}: {name} is {error:.2f} away from the original, expected below 0.5")


def difference(values: Tensor, original: Tensor) -> float:
    """Relative error after the best scale for every column, then one for every row."""
    columns = (values * original).sum(0) / values.square().sum(0).clamp(min=1e-30)
    fitted = values * columns
    rows = (fitted * original).sum(1, keepdim=True) / fitted.square().sum(1, keepdim=True).clamp(min=1e-30)
    error = (fitted * rows - original).square().sum() / original.square().sum().clamp(min=1e-30)
    return math.sqrt(float(error))
