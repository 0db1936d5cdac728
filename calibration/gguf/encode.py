"""Encode the tensors of one step of a GGUF file, with or without calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import naming
from mmquant.stages import stage

from ...convert.gguf.names import EXPERT_TENSORS, release_name, split_block
from ...convert.gguf.writer import TensorInfo
from ...convert.source import Source
from ...quantize.ggml.codec import encode
from ...quantize.ggml.types import GGMLType

CHUNK_WEIGHTS = {"cpu": 1 << 24, "cuda": 1 << 29}  # weights encoded at once; bounds the working memory


@dataclass(frozen=True)
class Matrices:
    """Where a GGUF tensor's matrices come from: `experts` stacked ones, or a single one."""

    source: Source
    info: TensorInfo

    @property
    def count(self) -> int:
        """Experts in the tensor, 1 for a plain matrix."""
        return self.info.shape[0] if len(self.info.shape) == 3 else 1

    def read(self, chosen: range, device: torch.device | str) -> Tensor:
        """[len(chosen), out, in] float32 on the device."""
        layer, rest = split_block(self.info.name)
        if len(self.info.shape) == 3:
            assert layer is not None
            projection = EXPERT_TENSORS[rest.removesuffix(".weight")]
            return self.source.read_experts(layer, projection, chosen, device, torch.float32)
        return self.source.read(release_name(self.source.geometry.names, self.info.name)).to(device).unsqueeze(0)


def encode_plain(source: Source, info: TensorInfo) -> np.ndarray:
    """A vector or an unquantized small matrix: float32 bytes."""
    return source.read(release_name(source.geometry.names, info.name)).float().contiguous().numpy()


def encode_tensors(
    source: Source, tensors: Sequence[TensorInfo], device: torch.device | str
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bytes) of the tensors in order, without calibration; a few experts are held at a time."""
    for info in tensors:
        if len(info.shape) == 1 or (info.type == "F32" and len(info.shape) == 2):
            yield info.name, encode_plain(source, info)
        else:
            yield info.name, encode_nearest(Matrices(source, info), device)


def encode_nearest(matrices: Matrices, device: torch.device | str, importance: Tensor | None = None) -> np.ndarray:
    """uint8 bytes of a tensor, every weight at its nearest point of the grid that is searched under importance [in]."""
    with stage("encode"):
        return _encode_nearest(matrices, device, importance)


def _encode_nearest(matrices: Matrices, device: torch.device | str, importance: Tensor | None) -> np.ndarray:
    info, kind = matrices.info, GGMLType[matrices.info.type]
    out = np.empty((info.bytes // kind.row_bytes(info.shape[-1]), kind.row_bytes(info.shape[-1])), np.uint8)
    rows = info.shape[-2]
    for chosen in chunks(matrices.count, rows * info.shape[-1], device):
        weights = matrices.read(chosen, device)
        for start in range(0, len(chosen) * rows, block := row_block(info.shape[-1], device)):
            part = weights.view(-1, info.shape[-1])[start : start + block]
            first = chosen.start * rows + start
            with naming(info.name):
                out[first : first + len(part)] = encode(part, kind, importance).cpu().numpy()
    return out


def chunks(experts: int, weights: int, device: torch.device | str) -> Iterator[range]:
    """Ranges of experts that together hold about as many weights as may be encoded at once."""
    step = max(1, CHUNK_WEIGHTS[torch.device(device).type] // weights)
    for start in range(0, experts, step):
        yield range(start, min(experts, start + step))


def row_block(columns: int, device: torch.device | str) -> int:
    """Rows of one matrix that may be encoded at once (embeddings are larger than a layer's expert)."""
    return max(1, CHUNK_WEIGHTS[torch.device(device).type] // columns)
