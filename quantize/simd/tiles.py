"""Tiles of blocks for the CPU kernels: sub-blocks side by side in vectors, and parts for threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import torch

from .memory import transpose

if TYPE_CHECKING:
    from .typed import Floats, Integers, Lanes

LANES = (0,) * 16  # sub-blocks side by side
inline = numba.njit(cache=True, fastmath=True, nogil=True, error_model="numpy", forceinline=True)


def in_threads(work: Callable[[int, int], None], total: int, count: int) -> None:
    """work(first, stop) over range(total), `count` at a time, in as many threads as torch uses."""
    starts = range(0, total, count)
    stops = [min(first + count, total) for first in starts]
    threads = min(torch.get_num_threads(), len(stops))
    if threads <= 1:
        for part in zip(starts, stops, strict=True):
            work(*part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, starts, stops))


def part_of(total: int, least: int = 64) -> int:
    """How many of `total` one thread takes, so that all have as many, but none fewer than `least`."""
    threads = min(torch.get_num_threads(), max(1, total // least))
    return max(1, -(-total // threads))


@inline
def places(
    begin: int,
    stop: int,
    ks: Lanes,
    subs: Lanes,
    per_row: int,
    share: int,
    starts: Integers,
    other: Integers,
):
    """Where a tile's sub-blocks start in the weights (`starts`) and in the importance; its first block is `begin`.

    Behind the last block, stop - 1, stands that block again. per_row, share: see `weighted.Weighted`.
    """
    column, row, group = begin % per_row, begin // per_row % share, begin // per_row // share
    p = begin
    for i in range(0, len(starts), len(subs)):
        weight = group * per_row + column
        for j in range(len(subs)):
            starts[i + j] = (p * len(subs) + j) * len(ks)
            other[i + j] = (weight * len(subs) + j) * len(ks)
        if p < stop - 1:  # counted on: a division for each block would take longer than all else
            p, column = p + 1, column + 1
            if column == per_row:
                column, row = 0, row + 1
                if row == share:
                    row, group = 0, group + 1


@inline
def turned(source: Floats, starts: Integers, ks: Lanes, ls: Lanes, out: Floats):
    """The sub-blocks of `source` that begin at `starts`, a column of them in each row of out [K, L]."""
    for k in range(0, len(ks), len(ls)):
        transpose(source, starts, k, out, ls)
