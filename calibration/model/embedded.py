"""Embed windows on all ranks from one reading of the table, which takes gigabytes and is needed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ...convert.source import Source
from .distributed import current_ranks, movable, world
from .reading import FirstReads


def embedded(source: Source, tokens: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(first window, embeddings [<= batch, T, H] float32) of this rank's windows [W, T].

    The first rank reads and looks up for all; every rank must take everything.
    """
    rank, size = world()
    if size == 1:
        yield from looked_up(source.read(source.geometry.names.embed), tokens, batch)
        return
    asked = current_ranks().gather(tokens)
    if rank == 0:
        inner = source.inner if isinstance(source, FirstReads) else source
        assert inner is not None
        table = inner.read(inner.geometry.names.embed)
        for other in range(1, size):
            for _, values in looked_up(table, asked[other], batch):
                dist.send(movable(values), dst=other)
        yield from looked_up(table, tokens, batch)
        return
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        values = movable(torch.empty(*part.shape, source.geometry.hidden))
        dist.recv(values, src=0)
        yield start, values


def looked_up(table: Tensor, tokens: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(first window, rows of the table) of windows [W, T], some at a time."""
    for start in range(0, len(tokens), batch):
        yield start, torch.nn.functional.embedding(tokens[start : start + batch], table)
