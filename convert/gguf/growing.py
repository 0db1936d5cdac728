"""Read a GGUF model that is still being written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ..checkpoints.growing import read_part
from .header import GgufFile, parse_header
from .writer import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GrowingBytes:
    """The bytes of a part as an array that is sliced: its header from memory, its tensors from the file as it grows."""

    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.header, self.size = path, part.header, part.bytes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice) -> NDArray[np.uint8]:
        start, stop, _ = where.indices(self.size)
        if stop <= len(self.header):
            return np.frombuffer(self.header[start:stop], np.uint8)
        return np.frombuffer(read_part(self.path, start, max(0, stop - start)), np.uint8)


def growing_file(folder: Path, part: Part) -> GgufFile:
    """A part of a set on its way, as the reader has it."""
    path = folder / part.name
    return parse_header(path, cast("NDArray[np.uint8]", GrowingBytes(path, part)))
