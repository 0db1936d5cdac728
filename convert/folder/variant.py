"""Interface of a folder variant, and what all variants share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quantization_config import QUANTIZATION_KEYS
from ..formats.spec import TensorSpec
from ..formats.table import METHODS
from ..models.rope import DEFAULT
from ..models.shapes import global_shapes
from ..remote_code import with_code


class FolderVariant(Protocol):
    """A safetensors artifact: its tensors are known by size before any value is computed."""

    @property
    def label(self) -> str:
        """Short name for tables and manifests."""
        ...

    @property
    def format(self) -> str:
        """The manifest's format: compressed-tensors, awq, fp8-block, safetensors."""
        ...

    def run(self) -> dict[str, Any]:
        """Everything that decides the bytes, apart from the source: identifies a run."""
        ...

    def specs(self, source: Checkpoint, layer: int) -> list[TensorSpec]:
        """The tensors of one layer, in the order of the file."""
        ...

    def layer(self, source: Checkpoint, layer: int, device: torch.device | str) -> dict[str, Tensor]:
        """The same tensors' values."""
        ...

    def quantization_config(self, source: Checkpoint) -> dict[str, Any] | None:
        """config.json's quantization_config; None where nothing is quantized."""
        ...


@runtime_checkable
class StoresOutside(Protocol):
    """A variant that quantizes embeddings or head, too."""

    def outside_specs(self, source: Checkpoint) -> list[TensorSpec]:
        """Tensors of embeddings, final norm and head."""
        ...

    def outside_tensors(self, source: Checkpoint, first: bool, device: torch.device | str) -> dict[str, Tensor]:
        """Values of the embeddings' (`first`), or of the other ones'."""
        ...


def plain_specs(source: Checkpoint, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[TensorSpec]:
    """Tensors that are carried as they are stored."""
    return [TensorSpec(name, source.tensors[name].dtype, shape) for name, shape in shapes]


def plain_tensors(source: Checkpoint, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Values of tensors that are carried as they are stored."""
    return {name: source.raw(name) for name, _ in shapes}


def global_specs(source: Checkpoint) -> list[TensorSpec]:
    """Embeddings, final norm and head, as stored."""
    return plain_specs(source, _globals(source))


def global_tensors(source: Checkpoint, first: bool) -> dict[str, Tensor]:
    """The embeddings (`first`), or the final norm and head: each needs its own shards at its own time."""
    embed = source.names.embed
    return plain_tensors(source, [(name, shape) for name, shape in _globals(source) if (name == embed) == first])


def _globals(source: Checkpoint) -> list[tuple[str, tuple[int, ...]]]:
    head = source.names.head
    return [(n, s) for n, s in global_shapes(source.geometry).items() if n != head or n in source.tensors]


def quantized_config(source: Checkpoint, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The source's config.json with another quantization_config or none, and RoPE spelled out.

    transformers before 5.23 ignores `rotary_dim` and would rotate every dimension; `rope_parameters` is read by all.
    Where there is a `rope_scaling`, transformers 5 lets it win: it says the same.
    """
    g = source.geometry
    config = with_code(source.config, source.small_file)
    config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    scaling = {"rope_type": DEFAULT} if g.rope_scaling is None else g.rope_scaling.parameters()
    rope = {**scaling, "rope_theta": g.rope_theta, "partial_rotary_factor": g.rotary_dim / g.head_dim}
    config["rope_parameters"] = rope
    if g.rope_scaling is not None:
        config["rope_scaling"] = {"type": g.rope_scaling.kind, **rope}
    else:
        config.pop("rope_scaling", None)
    config.setdefault("rope_theta", g.rope_theta)
    config.setdefault("rotary_dim", g.rotary_dim)
    if config.get("tie_word_embeddings") and source.names.head in source.tensors:
        config["tie_word_embeddings"] = False
    if quantization is None:
        return config | {("dtype" if "dtype" in config else "torch_dtype"): "bfloat16"}
    method = METHODS[str(quantization["quant_method"])]
    if not method.top_key:
        return config | {"quantization_config": quantization}
    settings = {key: value for key, value in quantization.items() if key != "quant_method"}
    wanted = dict(g.architecture.mlx_config)
    return {**wanted, **config, method.top_key: settings, "quantization_config": settings}
