"""The codebooks of the I-quants as pairs of halves, for the search on the CPU.

A point's error is a sum over its weights, so a point of four parts costs what its parts cost. Two neighbouring parts
are a half. Few halves make many points (IQ1: 81 first ones and 81 second ones make 2048): once the halves are priced, a
point costs one addition and one comparison.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .tables import points

PAD = 16  # what lanes may read behind the last point


class Book(NamedTuple):
    """One codebook of N points of `group` weights.

    points  [N, group] float32
    levels  [L] float32: the values that occur
    parts   [P, group / 4] float32: what a quarter of a point may be
    outer   [I, 2] int64: parts of each first half
    inner   [J, 2] int64: parts of each second half
    start   [I + 1] uint64: where the points of a first half begin in `mate` and `code`
    mate    [N] int64: the second half of each point
    code    [N] int64: its row of `points`
    ends    [group / 2, N + 16] float32: its second half, with zeros behind
    """

    points: np.ndarray
    levels: np.ndarray
    parts: np.ndarray
    outer: np.ndarray
    inner: np.ndarray
    start: np.ndarray
    mate: np.ndarray
    code: np.ndarray
    ends: np.ndarray


@lru_cache
def book(name: str) -> Book:
    """The codebook of the type `name`; first halves by their number of points, so that loops seldom change length."""
    table = points(name)
    parts, part = np.unique(table.reshape(len(table), 4, -1).reshape(4 * len(table), -1), axis=0, return_inverse=True)
    part = part.reshape(-1, 4)
    outer, first, count = np.unique(part[:, :2], axis=0, return_inverse=True, return_counts=True)
    inner, second = np.unique(part[:, 2:], axis=0, return_inverse=True)
    order = np.argsort(count, kind="stable")
    code = np.argsort(np.argsort(order)[first.reshape(-1)], kind="stable")
    start = np.concatenate(([0], np.cumsum(count[order]))).astype(np.uint64)
    whole = (np.ascontiguousarray(t, np.int64) for t in (outer[order], inner, second.reshape(-1)[code], code))
    outer, inner, mate, code = whole
    ends = np.ascontiguousarray(np.pad(table[code, table.shape[1] // 2 :].T, ((0, 0), (0, PAD))))
    return Book(table, np.unique(table), parts, outer, inner, start, mate, code, ends)
