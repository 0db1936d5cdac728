"""The grid on which a kind of a planned folder has its codes, by the command whose format it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmquant.errors import InputError

from ...convert.folder.kinds import Kind
from ...quantize.fp4.grid import MXFP4, NVFP4
from ...quantize.integer.gptq import GptqGrid, Grid

GRIDS: Mapping[str, Callable[[Kind], Grid]] = {
    "int4": lambda kind: GptqGrid(kind.bits, kind.group),
    "nvfp4": lambda kind: NVFP4,
    "mxfp4": lambda kind: MXFP4,
}


def grid_of(kind: Kind) -> Grid:
    """The grid of a calibrated kind. InputError for a format without one."""
    command = "" if kind.storage is None else kind.storage.command
    if command not in GRIDS:
        raise InputError(f"{kind.word}: has no grid that calibration works on, expected {', '.join(GRIDS)}")
    return GRIDS[command](kind)
