"""The grid on which a kind of a planned folder has its codes, by the command whose format it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmquant.errors import InputError

from ...convert.folder.kinds import Kind
from ...quantize.affine.grid import AffineGrid
from ...quantize.fp4.grid import MXFP4, NVFP4
from ...quantize.integer.gptq_grid import GptqGrid
from ...quantize.integer.panel import Grid


def mlx_grid(kind: Kind) -> Grid:
    """By the mode of mlx_lm's format."""
    blocks = {"mxfp4": MXFP4, "nvfp4": NVFP4}
    return blocks.get("" if kind.storage is None else kind.storage.kind) or AffineGrid(kind.bits, kind.group)


GRIDS: Mapping[str, Callable[[Kind], Grid]] = {
    "int4": lambda kind: GptqGrid(kind.bits, kind.group),
    "nvfp4": lambda kind: NVFP4,
    "mxfp4": lambda kind: MXFP4,
    "mlx": mlx_grid,
}


def grid_of(kind: Kind) -> Grid:
    """The grid of a calibrated kind. InputError for a format without one."""
    command = "" if kind.storage is None else kind.storage.command
    if command not in GRIDS:
        raise InputError(f"{kind.word}: has no grid that calibration works on, expected {', '.join(GRIDS)}")
    return GRIDS[command](kind)
