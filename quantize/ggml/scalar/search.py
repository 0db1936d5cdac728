"""Search the scales of rows: cut into blocks, searched by the device's kernels, joined again."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..types import GGMLType
from . import mxfp4
from .effort import Effort, plan
from .grid import Grid
from .weighted import Weighted, cut, empty


def search_rows(rows: Tensor, kind: GGMLType, importance: Tensor | None, effort: Effort) -> tuple[Grid, Tensor]:
    """The grid of `rows` [R, n] float32 and the nearest codes uint8 [R, n]; importance [G, n] (G divides R) or None.

    CUDA tensors are searched by Triton, all others (and CUDA's where Triton is missing) by numba on the CPU.
    """
    if rows.device.type != "cpu" and not (rows.is_cuda and find_spec("triton")):
        grid, codes = search_rows(rows.cpu(), kind, None if importance is None else importance.cpu(), effort)
        return grid.to(rows.device), codes.to(rows.device)
    blocks = cut(rows, kind.block_columns, importance)
    if kind is GGMLType.MXFP4:
        exponents, codes = search_exponents(blocks)
        return Grid(kind, exponents.view(len(rows), rows.shape[1] // kind.block_columns)), codes.view(rows.shape)
    search = plan(kind, effort, importance is not None)
    form, wide = search.form, (len(rows), rows.shape[1] // kind.block_columns)
    fine = (len(rows), rows.shape[1] // form.sub)
    found = empty(blocks, kind.block_columns // form.sub)
    if rows.is_cuda:
        from . import search_triton as search_cuda

        search_cuda.search_blocks(blocks, search, found)
    else:
        from . import search_cpu

        search_cpu.search_blocks(blocks, search, found)
    grid = Grid(
        kind,
        found.d.view(wide),
        found.dmin.view(wide) if form.minimums is not None else None,
        found.steps.view(fine) if form.steps is not None else None,
        found.minimums.view(fine) if form.minimums else None,
    )
    return grid, found.codes.view(rows.shape)


def search_exponents(blocks: Weighted) -> tuple[Tensor, Tensor]:
    """MXFP4's exponents uint8 [P] and codes uint8 [P, 32]."""
    if blocks.x.is_cuda:
        return mxfp4.search_blocks(blocks)
    from . import mxfp4_cpu

    exponents = torch.empty(len(blocks.x), dtype=torch.uint8)
    codes = torch.empty(blocks.x.shape, dtype=torch.uint8)
    mxfp4_cpu.search_exponents(blocks, exponents, codes)
    return exponents, codes
