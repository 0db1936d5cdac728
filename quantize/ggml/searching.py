"""Rows to grids: cut into blocks, weighted, searched in chunks by the route of their device, and put together again.

CUDA: `search` compiled by torch (Triton underneath); without Triton or a C compiler the same code uncompiled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from .effort import Effort
from .grid import FORMS, Grid
from .search import Problem, find, find_exponent
from .types import GGMLType

_CHUNK = 1 << 26  # weights at a time on an accelerator
_CPU_CHUNK = 1 << 16
_FLOOR = 1e-6  # least importance beside the mean of a block: a weight that never matters still gets a sensible value

Search = Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]


def search_rows(rows: Tensor, kind: GGMLType, importance: Tensor | None, effort: Effort) -> tuple[Grid, Tensor]:
    """The grid of `rows` [R, n] float32 and the nearest codes uint8 [R, n]; importance [n], [G, n] or None."""
    form, block = FORMS[kind], kind.block_columns
    subs = block // form.sub
    x = rows.reshape(-1, subs, form.sub)
    function = _search(kind, effort, rows.is_cuda)
    size = max(1, (_CHUNK if rows.is_cuda else _CPU_CHUNK) // block)
    parts = []
    for first in range(0, len(x), size):
        chunk = x[first : first + size]
        weight = torch.ones((), device=rows.device).expand(chunk.shape)
        if importance is not None:
            weight = _weight(importance, rows.shape, first, len(chunk), block).view(chunk.shape)
        if rows.is_cuda:
            torch._dynamo.maybe_mark_dynamic(chunk, 0)
            torch._dynamo.maybe_mark_dynamic(weight, 0)
        parts.append(function(chunk, weight))
    d, dmin, steps, minimums, codes = (None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True))
    shaped = (None if p is None else p.reshape(len(rows), -1) for p in (d, dmin, steps, minimums))
    assert codes is not None
    return Grid(kind, *shaped), codes.view(rows.shape)  # type: ignore[arg-type]


def _weight(importance: Tensor, shape: torch.Size, first: int, count: int, block: int) -> Tensor:
    """Importance [count, block] of the blocks first .. first + count, of mean 1 and never zero."""
    per_row = shape[1] // block
    table = importance.reshape(-1, block)
    mean = table.mean(1, keepdim=True)
    table = torch.where(mean > 0, table / mean, 1.0).clamp(min=_FLOOR)
    index = torch.arange(first, first + count, device=importance.device)
    share = shape[0] // (len(table) // per_row)
    return table[(index // per_row // share) * per_row + index % per_row]


@lru_cache(maxsize=64)
def _search(kind: GGMLType, effort: Effort, cuda: bool) -> Search:
    function = partial(_found, kind, effort)
    if cuda and _can_compile():
        return torch.compile(function, dynamic=None)
    return function


def _can_compile() -> bool:
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return find_spec("triton") is not None and any(shutil.which(c) for c in compilers if c)


def _found(kind: GGMLType, effort: Effort, x: Tensor, w: Tensor) -> tuple[Tensor | None, ...]:
    problem = Problem(x, w, FORMS[kind])
    found = find_exponent(problem) if kind is GGMLType.MXFP4 else find(problem, effort)
    form = FORMS[kind]
    d = found.d.to(torch.uint8 if kind is GGMLType.MXFP4 else torch.float16)
    dmin = None if found.dmin is None else found.dmin.half()
    steps = found.steps.to(torch.int16) if form.steps else None
    minimums = found.minimums.to(torch.int16) if form.minimums and found.minimums is not None else None
    return d, dmin, steps, minimums, found.codes
