"""Bytes of an artifact's tensors by kind: what every token reads, and the routed experts of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..formats.format import Scheme, specs
from ..formats.spec import DTYPE_BYTES
from ..gguf.mixes import Mix, tensor_bytes, tensor_types
from ..gguf.names import EXPERT_TENSORS, OUTPUT, TOKEN_EMBD, all_shapes, split_block
from ..models.geometry import Geometry
from ..models.names import PROJECTIONS
from ..models.shapes import attention_shapes, expert_shape


@dataclass(frozen=True)
class Weights:
    """Bytes of tensor data.

    resident      everything but the routed experts: attention, norms, router, embeddings, head
    expert_layer  routed experts of each layer
    embedding     of `resident`, the token embeddings: llama.cpp looks them up in RAM
    head          of `resident`, the output matrix
    """

    resident: int
    expert_layer: tuple[int, ...]
    embedding: int = 0
    head: int = 0

    @property
    def experts(self) -> int:
        """Of all layers."""
        return sum(self.expert_layer)

    @property
    def total(self) -> int:
        """Of everything."""
        return self.resident + self.experts


def plain_bytes(g: Geometry) -> int:
    """Of a layer's tensors that are never quantized, as released: router and bias in float32, norms in bfloat16."""
    wide = ("router", "router_bias")
    return sum(
        math.prod(shape) * DTYPE_BYTES["F32" if field in wide else "BF16"] for field, shape in g.plain_fields().items()
    )


def matrix_bytes(scheme: Scheme | None, shape: tuple[int, int], scale_dtype: str | None = None) -> int:
    """Bytes of one matrix (outputs, inputs) in a format of the table; None: bfloat16."""
    if scheme is None:
        return shape[0] * shape[1] * DTYPE_BYTES["BF16"]
    return sum(spec.bytes for spec in specs(scheme, "", shape, scale_dtype))


def folder_weights(
    g: Geometry, experts: Scheme, attention: Scheme | None, release: bool = False, tables: Scheme | None = None
) -> Weights:
    """Of a folder whose experts and attention lie in these schemes (None: bfloat16), the rest as released.

    release: FP8 tiles carry the release's own float32 scales. tables: how embeddings and head lie.
    """

    def scales(scheme: Scheme | None) -> str | None:
        return "F32" if release and scheme is not None and scheme.block else None

    layer = g.experts * sum(matrix_bytes(experts, expert_shape(g, p), scales(experts)) for p in PROJECTIONS)
    dense = sum(matrix_bytes(attention, shape, scales(attention)) for shape in attention_shapes(g).values())
    table = matrix_bytes(tables, (g.vocab, g.hidden))
    norm = g.hidden * DTYPE_BYTES["BF16"]
    resident = g.layers * (dense + plain_bytes(g)) + 2 * table + norm
    return Weights(resident, (layer,) * g.layers, table, table)


def gguf_weights(g: Geometry, types: Mapping[str, str]) -> Weights:
    """Of a GGUF file, from the type of each tensor."""
    sizes = {name: tensor_bytes(types[name], shape) for name, shape in all_shapes(g).items()}
    return by_kind(g.layers, sizes)


def mix_weights(g: Geometry, mix: Mix, calibrated: bool = True) -> Weights:
    """Of a stock mix. calibrated: with an importance matrix some mixes choose other types."""
    return gguf_weights(g, tensor_types(mix, g, importance=calibrated))


def by_kind(layers: int, sizes: Mapping[str, int]) -> Weights:
    """Bytes of GGUF tensors by name -> Weights; the head is what `output.weight` holds."""
    experts, resident = [0] * layers, 0
    for name, size in sizes.items():
        layer, rest = split_block(name)
        if layer is not None and rest.removesuffix(".weight") in EXPERT_TENSORS:
            experts[layer] += size
        else:
            resident += size
    return Weights(resident, tuple(experts), sizes.get(TOKEN_EMBD, 0), sizes.get(OUTPUT, 0))
