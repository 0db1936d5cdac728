"""Names of what a row's command writes: the folder, and the file of it that engines are given."""

from __future__ import annotations

from ..gguf.mixes import MIXES, tensor_types
from ..gguf.names import all_shapes
from ..gguf.writer import TensorInfo, plan_parts
from ..models.geometry import Geometry
from .catalog import GGUF, Row


def folder_of(row: Row, stem: str) -> str:
    """The folder into which the suggested command writes."""
    return f"./{stem}-{row.id}"


def entry_of(row: Row, g: Geometry, stem: str) -> tuple[str, int]:
    """(what engines are given, files of a split GGUF) once the suggested command has run."""
    folder = folder_of(row, stem)
    if row.family != GGUF:
        return folder, 1
    types = tensor_types(MIXES[row.id], g)
    tensors = tuple(TensorInfo(name, shape, types[name]) for name, shape in all_shapes(g).items())
    parts = plan_parts(f"{stem}-{row.id}", {}, tensors)
    return f"{folder}/{parts[0].name}", len(parts)
