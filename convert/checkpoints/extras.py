"""Recognize tensors that other tools add and no weight depends on; skip and report them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..models.minimax_m2.names import MATRIX

_LAYER = r"model\.layers\.\d+\."
KINDS = {
    "rotary tables (computed from config.json)": re.compile(
        r"(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)"
    ),
    "scales of an FP8 KV cache": re.compile(
        rf"{_LAYER}self_attn\.(?:attn\.|[qkv]_proj\.)?(?:[qkv]|kv|prob|output)_(?:scale|zero_point)"
    ),
    "static scales of activations": re.compile(
        rf"{MATRIX}\.(?:input|act|activation|output)_(?:scale|zero_point|global_scale)"
    ),
}


def extra_kind(name: str) -> str | None:
    """What sort of harmless tensor this is; None for one that means something, or that is not known."""
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), None)


def extra_notes(label: str, names: Iterable[str]) -> list[str]:
    """A line for each sort of tensor that is skipped."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(extra_kind(name) or "others", []).append(name)
    return [f"{label}: {len(some)} {kind} skipped, first {some[0]}" for kind, some in found.items()]
