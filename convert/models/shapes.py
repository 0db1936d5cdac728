"""Names and shapes of a checkpoint's tensors, from its geometry."""

from __future__ import annotations

from collections.abc import Iterator

from .geometry import Geometry
from .names import ATTENTION, PROJECTIONS


def is_mtp(name: str, geometry: Geometry) -> bool:
    """Multi-token-prediction tensors: known, not part of the language model, skipped."""
    layer = geometry.names.layer_of(name)
    return (layer is not None and layer >= geometry.layers) or ".mtp" in name or name.startswith(("mtp.", "mtp_"))


def attention_shapes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Projection -> (out, in) of a layer's attention matrices."""
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    return dict(zip(ATTENTION, ((q, g.hidden), (kv, g.hidden), (kv, g.hidden), (g.hidden, q)), strict=True))


def expert_shape(geometry: Geometry, projection: str) -> tuple[int, int]:
    """(out, in) of one projection of an expert."""
    g = geometry
    return (g.hidden, g.expert_width) if projection == "down" else (g.expert_width, g.hidden)


def matrix_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name without .weight, (out, in)) of a layer's quantizable matrices: attention, then experts."""
    names = geometry.names
    for projection, shape in attention_shapes(geometry).items():
        yield names.attention(layer, projection), shape
    for expert in range(geometry.experts):
        for projection in PROJECTIONS:
            yield names.expert(layer, expert, projection), expert_shape(geometry, projection)


def plain_shapes(geometry: Geometry, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(full name, shape) of a layer's tensors that are never quantized: norms, router and its bias."""
    prefix = geometry.names.prefix(layer)
    for field, shape in geometry.plain_fields().items():
        yield prefix + geometry.names.plain[field], shape


def global_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """(full name, shape) outside the layers."""
    g, names = geometry, geometry.names
    return {names.embed: (g.vocab, g.hidden), names.final_norm: (g.hidden,), names.head: (g.vocab, g.hidden)}
