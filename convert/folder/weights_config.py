"""quantization_config of a folder whose layers differ, and its plan in words."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import Checkpoint
from ..formats import compressed_tensors as ct
from ..formats.format import Scheme
from .schemes import on_grid

if TYPE_CHECKING:
    from .weights import WeightsVariant

EXPERTS_PART, ATTENTION_PART = r"experts\..*", r"self_attn\..*"  # in the names that engines match


def mixed_config(variant: WeightsVariant, source: Checkpoint) -> dict[str, Any]:
    """quantization_config: one group for experts (and attention), groups by width, an FP8 group beside them.

    Top level pack-quantized: SGLang refuses "mixed-precision" for INT4 experts, so every group names its own format.
    """
    v, cache, attention = variant, variant.kv_cache == "fp8", variant.attention_scheme(source, 0)
    scheme, row = v.scheme(v.bits), v.storage
    whole = attention == scheme
    if whole and not v.eight_bit:
        return ct.one_group(scheme, True, source.names, cache)
    groups: dict[str, dict[str, Any]] = {}
    if v.eight_bit:
        groups[v.scheme(8).label] = ct.entry(v.scheme(8), [layers_target(v.eight_bit)])
    rest = tuple(layer for layer in range(source.geometry.layers) if layer not in v.eight_bit)
    targets = [layers_target(rest)] if v.eight_bit else [ct.EXPERTS_TARGET]
    if whole:
        targets.append(ct.ATTENTION_TARGET)
    if not v.eight_bit or rest or whole:
        groups[scheme.label] = ct.entry(scheme, targets)
    if attention is not None and not whole:
        groups[attention.label] = ct.entry(attention, [ct.ATTENTION_TARGET])
    ignore = (*source.names.ignore, ct.ATTENTION_TARGET) if attention is None else source.names.ignore
    return ct.quantization_config(groups, row.name, ignore, cache)


def planned_config(variant: WeightsVariant, source: Checkpoint) -> dict[str, Any]:
    """quantization_config of a plan: one group for each scheme, its targets name the layers; bfloat16 is ignored."""
    layers = range(source.geometry.layers)
    by_scheme: dict[Scheme | None, dict[str, list[int]]] = {}
    for layer in layers:
        found = (variant.experts_scheme(source, layer), variant.attention_scheme(source, layer))
        for part, scheme in zip((EXPERTS_PART, ATTENTION_PART), found, strict=True):
            by_scheme.setdefault(scheme, {}).setdefault(part, []).append(layer)
    groups: dict[str, dict[str, Any]] = {}
    ignore = list(source.names.ignore)
    for scheme, parts in by_scheme.items():
        targets = [layers_target(tuple(some), part) for part, some in parts.items()]
        if scheme is None:
            ignore += targets
        else:
            label = scheme.label if on_grid(scheme) and scheme.group < 0 else f"{scheme.label}-{_size(scheme)}"
            groups[label] = ct.entry(scheme, targets)
    return ct.quantization_config(groups, variant.storage.name, tuple(ignore), variant.kv_cache == "fp8")


def _size(scheme: Scheme) -> str:
    return f"g{scheme.group}" if scheme.block is None else "x".join(map(str, scheme.block))


def planned_words(variant: WeightsVariant) -> dict[str, str]:
    """A plan in short: of experts and attention the kinds with their layers, equal neighbours together."""
    found: dict[str, str] = {}
    for place, part in enumerate(("experts", "attention")):
        found[part] = layers_in_words([(layer, pair[place].word) for layer, pair in enumerate(variant.kinds)])
    return found


def layers_in_words(kinds: list[tuple[int, str]]) -> str:
    """Layers and the words for how they are stored, equal neighbours together: 0-3 int4, 4 int8."""
    runs = [list(run) for _, run in groupby(kinds, key=lambda item: item[1])]
    return ", ".join(f"{_span(run[0][0], run[-1][0])} {run[0][1]}" for run in runs)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def layers_target(layers: tuple[int, ...], part: str = EXPERTS_PART) -> str:
    """A pattern for a part of some layers that matches in vLLM (mlp.experts) and SGLang (the release's name)."""
    return rf"re:.*\.layers\.({'|'.join(str(layer) for layer in layers)})\..*{part}"
