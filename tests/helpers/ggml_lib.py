"""Call ggml itself, from the wheel of the `llamacpp` extra, as reference for encoders and decoders."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import mmquant.runs.evaluation.llamacpp as llamacpp
from mmquant.quantize.ggml.types import GGMLType


def need() -> None:
    """Skip the calling test where the wheel with ggml is not installed."""
    if not llamacpp.available():
        pytest.skip("needs the llamacpp extra")


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The library with the functions below declared."""
    lib = llamacpp.load_library()
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return lib


def encode(rows: Tensor, kind: GGMLType, importance: Tensor | None = None) -> Tensor:
    """ggml_quantize_chunk: uint8 [R, bytes of a row] of float32 [R, n], importance [n]."""
    imatrix = None if importance is None else importance.numpy()
    return torch.from_numpy(llamacpp.quantize(int(kind), rows.numpy(), imatrix))


def decode(data: Tensor, kind: GGMLType, columns: int) -> Tensor:
    """ggml's dequantize_row_*: float32 [R, columns] of uint8 [R, bytes of a row]."""
    function = getattr(
        load_library(),
        f"dequantize_row_{kind.name[0].lower()}{kind.name[1:]}"
        if kind.name.endswith("_K")
        else f"dequantize_row_{kind.name.lower()}",
    )
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    source = np.ascontiguousarray(data.numpy())
    out: NDArray[np.float32] = np.empty((len(source), columns), np.float32)
    for i in range(len(source)):
        function(source[i].ctypes.data, out[i].ctypes.data, columns)
    return torch.from_numpy(out)


def valid(data: Tensor, kind: GGMLType) -> bool:
    """ggml's own check of finite scales, the one llama.cpp makes when it loads with --check-tensors."""
    source = np.ascontiguousarray(data.numpy())
    return bool(load_library().ggml_validate_row_data(int(kind), source.ctypes.data, source.nbytes))


def ggml_rounds(name: str, x: Tensor, block: int) -> Tensor:
    """x through quantize_row_NAME_ref and dequantize_row_NAME."""
    lib = load_library()
    values = np.ascontiguousarray(x.numpy())
    room, out = np.zeros(len(values) // block * 512 + 512, np.uint8), np.empty_like(values)
    for function in (quantize := getattr(lib, f"quantize_row_{name}_ref"), getattr(lib, f"dequantize_row_{name}")):
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        first, second = (values, room) if function is quantize else (room, out)
        function(first.ctypes.data, second.ctypes.data, len(values))
    return torch.from_numpy(out)
