"""Recognize tensors that other tools add and no weight depends on; skip and report them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..models.names import TensorNames


@lru_cache
def patterns(names: TensorNames) -> dict[str, re.Pattern[str]]:
    """Sort of harmless tensor -> what it is called in an architecture."""
    attention = re.escape(names.attention_module) + r"\."
    layer = rf"{re.escape(names.layers)}\.\d+\."
    table = r"rotary_emb\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)"
    cache = r"(?:attn\.|[qkv]_proj\.)?(?:[qkv]|kv|prob|output)_(?:scale|zero_point)"
    return {
        "rotary tables (computed from config.json)": re.compile(
            rf"(?:model\.)?(?:layers\.\d+\.{attention})?{table}"  # older transformers leave out the prefix
        ),
        "scales of an FP8 KV cache": re.compile(rf"{layer}{attention}{cache}"),
        "static scales of activations": re.compile(
            rf"{names.matrix}\.(?:input|act|activation|output)_(?:scale|zero_point|global_scale)"
        ),
    }


def extra_kind(name: str, names: TensorNames) -> str | None:
    """What sort of harmless tensor this is; None for one that means something, or that is not known."""
    return next((kind for kind, pattern in patterns(names).items() if pattern.fullmatch(name)), None)


def extra_notes(label: str, skipped: Iterable[str], names: TensorNames) -> list[str]:
    """A line for each sort of tensor that is skipped."""
    found: dict[str, list[str]] = {}
    for name in skipped:
        found.setdefault(extra_kind(name, names) or "others", []).append(name)
    return [f"{label}: {len(some)} {kind} skipped, first {some[0]}" for kind, some in found.items()]
