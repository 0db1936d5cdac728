"""Some layers of a model: in words, and as the patterns that engines match."""

from __future__ import annotations

from itertools import groupby

EXPERTS_PART, ATTENTION_PART = r"experts\..*", r"self_attn\..*"  # in the names that engines match


def layers_in_words(kinds: list[tuple[int, str]]) -> str:
    """Layers and the words for how they are stored, equal neighbours together: 0-3 int4, 4 int8."""
    runs = [list(run) for _, run in groupby(kinds, key=lambda item: item[1])]
    return ", ".join(f"{_span(run[0][0], run[-1][0])} {run[0][1]}" for run in runs)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def layers_target(layers: tuple[int, ...], part: str = EXPERTS_PART) -> str:
    """A pattern for a part of some layers that matches in vLLM (mlp.experts) and SGLang (the release's name)."""
    return rf"re:.*\.layers\.({'|'.join(str(layer) for layer in layers)})\..*{part}"
