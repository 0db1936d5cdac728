"""FP8 folders: compressed-tensors tiles (exact from a native FP8 release) or one scale per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmquant.stages import stage

from ..checkpoints.batches import READERS
from ..checkpoints.checkpoint import Checkpoint
from ..formats.format import Format, Scheme, specs
from ..formats.fp8_block import TILE
from ..formats.spec import TensorSpec
from ..formats.table import choices
from ..models.shapes import matrix_shapes, plain_shapes
from .packing import folder_config, nearest_tensors
from .variant import plain_specs, plain_tensors
from .writer import DTYPE_NAMES

T = TypeVar("T")


def fp8_scheme(source: Checkpoint, row: Format) -> Scheme:
    """How matrices lie in an FP8 format: in tiles (of the source's own size) or with a scale a channel."""
    return Scheme(row, 8, block=(source.tile or TILE) if row.tiled else None)


def _kept(source: Checkpoint, name: str, scheme: Scheme) -> bool:
    """Whether the source stores a matrix as it is to be written: its codes and scales are carried as they are."""
    return source.has_channels(name) if scheme.block is None else source.tile_of(name) is not None


def fp8_specs(source: Checkpoint, name: str, shape: tuple[int, int], scheme: Scheme) -> list[TensorSpec]:
    """Tensors of a matrix [O, I] in FP8; scales that are carried keep their dtype: float32 keeps the release exact."""
    carried = DTYPE_NAMES[source.scale_dtype(name)] if _kept(source, name, scheme) else None
    return specs(scheme, name, shape, carried)


def fp8_tensors(source: Checkpoint, name: str, device: torch.device | str, scheme: Scheme) -> dict[str, Tensor]:
    """Values of the same tensors."""
    if _kept(source, name, scheme):
        codes, scales = source.native(name)
        return {name + ".weight": codes, name + ".weight_scale": scales.to(source.scale_dtype(name))}
    return nearest_tensors(scheme, [name], source.read(name + ".weight").to(device).unsqueeze(0))


def _each(source: Checkpoint, names: list[str], scheme: Scheme, read: Callable[[str], T]) -> Iterator[T]:
    """`read` of a layer's matrices in order; those that are carried, and lie in one shard, are read together."""

    def shard(name: str) -> str | None:
        parts = (name + ".weight", source.scale_name(name)) if _kept(source, name, scheme) else ()
        found = {source.tensors[part].shard for part in parts}
        return found.pop() if len(found) == 1 else None

    for where, group in groupby(names, shard):
        first, *rest = group
        yield read(first)  # which waits for the shard
        if where is None:
            yield from map(read, rest)
            continue
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(read, rest)
            for _ in rest:
                with stage("read"):  # threads know of no stages
                    value = next(found)
                yield value


@dataclass(frozen=True)
class Fp8Variant:
    """`scheme` block (tiles) or channel, for attention and experts; router, norms, embeddings, head as they are."""

    scheme: str = "block"

    @property
    def label(self) -> str:
        """Name of the artifact in tables and manifests."""
        return f"FP8-{self.scheme}"

    @property
    def storage(self) -> Format:
        """The storage format of its matrices."""
        return choices("fp8")[self.scheme]

    @property
    def format(self) -> str:
        """The manifest's format."""
        return self.storage.manifest

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source."""
        return {"command": "fp8", "scheme": self.scheme}

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        found, scheme = plain_specs(source, plain_shapes(source.geometry, layer)), fp8_scheme(source, self.storage)
        for name, shape in matrix_shapes(source.geometry, layer):
            found.extend(fp8_specs(source, name, shape, scheme))
        return found

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        tensors, scheme = plain_tensors(source, plain_shapes(source.geometry, layer)), fp8_scheme(source, self.storage)
        names = [name for name, _ in matrix_shapes(source.geometry, layer)]
        for found in _each(source, names, scheme, lambda name: fp8_tensors(source, name, device, scheme)):
            tensors |= found
        return tensors

    def quantization_config(self, source: Checkpoint) -> dict[str, Any]:
        """config.json's quantization_config."""
        return folder_config(fp8_scheme(source, self.storage), True, source.names)
