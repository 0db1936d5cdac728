"""Count a checkpoint's tensors by kind and dtype."""

from __future__ import annotations

import math
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
    groups: dict[tuple[str, str], tuple[int, int, int]] = {}
    for kind, dtype, shape, size in entries:
        count, total, weights = groups.get((kind, dtype), (0, 0, 0))
        groups[kind, dtype] = count + 1, total + size, weights + math.prod(shape)
    return [Kind(*place, *sums) for place, sums in sorted(groups.items())]
