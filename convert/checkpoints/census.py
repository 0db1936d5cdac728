"""Count a checkpoint's tensors by kind and dtype."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One row of the census: tensors of one kind and dtype."""

    kind: str
    dtype: str
    count: int
    bytes: int
    weights: int


def count_kinds(entries: Iterable[tuple[str, str, tuple[int, ...], int]]) -> list[Kind]:
    """Rows by kind and dtype of (kind, dtype, shape, bytes)."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for kind, dtype, shape, size in entries:
        groups.setdefault((kind, dtype), Counter()).update(count=1, bytes=size, weights=math.prod(shape))
    return [Kind(k, d, c["count"], c["bytes"], c["weights"]) for (k, d), c in sorted(groups.items())]
