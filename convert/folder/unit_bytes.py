"""Bytes of the units of a planned folder, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoints.checkpoint import Checkpoint
from ..formats.compressed_tensors import cache_specs
from ..formats.spec import TensorSpec
from ..models.shapes import attention_shapes, expert_shape, plain_shapes
from .kinds import EMBEDDINGS, EXPERT_FIELDS, HEAD, Kind, PlanRow
from .schemes import scheme_specs
from .variant import global_specs, plain_specs

ENTRY = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')  # of a header, without names and numbers


def unit_specs(source: Checkpoint, row: PlanRow, group: str, kind: Kind) -> Iterator[tuple[int, list[TensorSpec]]]:
    """(how often, tensors) of a unit that is called so in a plan; experts of a layer are alike."""
    g, names, scheme = source.geometry, source.names, kind.scheme(source)
    if group in (EMBEDDINGS, HEAD):
        matrix = (names.embed if group == EMBEDDINGS else names.head).removesuffix(".weight")
        yield 1, scheme_specs(source, matrix, (g.vocab, g.hidden), scheme)
        return
    _, layer, name = group.split(".")
    unit = row.units[name]
    for field in unit.fields:
        if field in EXPERT_FIELDS:
            longest = names.expert(int(layer), g.experts - 1, field)
            yield g.experts, scheme_specs(source, longest, expert_shape(g, field), scheme)
        else:
            projection = f"{field}_proj"
            shape = attention_shapes(g)[projection]
            yield 1, scheme_specs(source, names.attention(int(layer), projection), shape, scheme)


def fixed_bytes(source: Checkpoint, row: PlanRow, headers: bool = True) -> int:
    """Bytes of what has no choice: norms, routers, embeddings, head; with headers also theirs and a cache's scales.

    An FP8 cache's scales are few, and may be asked for when the plan is written.
    """
    chosen = {EMBEDDINGS: source.names.embed, HEAD: source.names.head}
    specs = [spec for spec in global_specs(source) if all(spec.name != chosen.get(unit) for unit in row.units)]
    extra: list[TensorSpec] = []
    for layer in range(source.geometry.layers):
        specs += plain_specs(source, plain_shapes(source.geometry, layer))
        extra += cache_specs(*(source.names.attention(layer, name) for name in ("k_proj", "v_proj")))
    size = sum(spec.bytes for spec in specs)
    if not headers:
        return size
    return size + header_bytes(source, [*specs, *extra]) + sum(spec.bytes for spec in extra)


def header_bytes(source: Checkpoint, specs: Sequence[TensorSpec]) -> int:
    """Of their entries in a safetensors header, at most: no offset lies beyond the model in bfloat16."""
    entry = ENTRY + 2 * len(str(2 * source.geometry.parameters))
    return sum(entry + len(spec.name) + len(spec.dtype) + len(",".join(map(str, spec.shape))) for spec in specs)
