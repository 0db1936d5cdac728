"""The residual stream of all windows between layers, in RAM or in a memory-mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmquant.errors import InputError

RAM_LIMIT = 8 << 30


def place_of(device: torch.device | str, size: int) -> torch.device:
    """Where hidden states of `size` bytes are kept: on a CUDA device up to a fifth of its free memory."""
    device = torch.device(device)
    if device.type == "cuda" and 5 * size <= torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")


def leaving(model: str, layer: int) -> str:
    """What messages call the hidden states that leave a layer."""
    return f"{model}: hidden states after layer {layer}"


def check_activations(values: Tensor, where: str, start: int = 0) -> None:
    """InputError unless hidden states [n, T, H] are finite; `start`: the number of the first window."""
    if bool(torch.isfinite(values).all()):
        return
    window, position, _ = (~torch.isfinite(values)).nonzero()[0].tolist()
    place = f"window {start + window}, position {position}"
    raise InputError(f"{where} hold NaN or infinity, first in {place}; expected finite hidden states")


class HiddenStates:
    """W windows x T positions x H channels of float32; batches are read, advanced by a layer and put back.

    device: where they lie (`place_of`); ram_limit is the CPU's.
    """

    def __init__(
        self,
        windows: int,
        length: int,
        hidden: int,
        ram_limit: int = RAM_LIMIT,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (windows, length, hidden)
        self.bytes = 4 * windows * length * hidden
        self._file = None
        if self.bytes <= ram_limit or torch.device(device).type != "cpu":
            self._values = torch.empty(self.shape, dtype=torch.float32, device=device)
            return
        # The file is unlinked with its handle: a killed process leaves nothing behind.
        self._file = tempfile.TemporaryFile(dir=folder, prefix="mmquant-hidden-")
        self._file.truncate(self.bytes)
        self._values = torch.from_numpy(np.memmap(self._file, dtype=np.float32, mode="r+", shape=self.shape))

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def batches(self, windows: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor]]:
        """(first window, values [<= windows, T, H] on the device); the values are a copy."""
        for start in range(0, self.shape[0], windows):
            part = self._values[start : start + windows]
            moved = part.to(device)
            yield start, moved.clone() if moved is part else moved

    def put(self, start: int, values: Tensor, where: str | None = None) -> None:
        """Store `values` [n, T, H] as windows start..start+n-1.

        where: whose values these are; with it, NaN or infinity raise InputError.
        """
        if where is not None:
            check_activations(values, where, start)
        self._values[start : start + values.shape[0]].copy_(values)

    def all(self) -> Tensor:
        """The stored tensor itself [W, T, H]."""
        return self._values
