"""Carry the residual stream through the layers: embed, advance, checkpoint, restore or replay."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...convert.files.atomic import is_temporary
from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from .distributed import rank_device, read_layer_shared, world
from .forward import Observer, layer_forward
from .hidden import RAM_LIMIT, HiddenStates, leaving, place_of

DISK_LIMIT = 64 << 30


class Stream:
    """The hidden states of one rank's windows; `layer` is the layer that they enter next.

    Checkpoints (HiddenStates.save), one file per layer, are kept in `folder` when their bytes (twice, for the exchange)
    stay within `disk_limit`; without one, a later start replays the layers before it, with the same result.
    """

    def __init__(
        self,
        source: Source,
        tokens: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int | None = None,
        folder: Path | None = None,
        ram_limit: int = RAM_LIMIT,
        disk_limit: int = DISK_LIMIT,
    ) -> None:
        """tokens [W, T]: this rank's windows; batch: windows at a time."""
        self.source, self.tokens, self.dtype = source, tokens, dtype
        self.device = rank_device(device)
        self.batch = batch if batch is not None else batch_windows(tokens.shape[1], self.device)
        self.rank, self.size = world()
        windows, length = tokens.shape
        channels = source.geometry.hidden
        place = place_of(self.device, 4 * windows * length * channels)
        self.hidden = HiddenStates(windows, length, channels, ram_limit, folder, place)
        self.folder = folder if 2 * self.hidden.bytes * self.size <= disk_limit else None
        self.layer = -1

    def start(self, layer: int, replay: bool = True) -> None:
        """Be ready to enter `layer`: from its checkpoint, else replaying layers from an earlier one or the embedding.

        Raises ValueError when layers would have to be replayed and `replay` is False (they were quantized ones).
        """
        self.layer = self._restore(layer)
        if self.layer < layer and not replay:
            raise InputError(
                f"{self.folder}: no hidden states of layer {layer} to continue from; start in a new folder"
            )
        while self.layer < layer:
            self.advance(self.read_layer(self.layer))

    def _restore(self, layer: int) -> int:
        """Take the latest checkpoint not behind `layer`, or the embedding; the layer that is entered next."""
        for candidate in range(layer, 0, -1):
            path = self._path(candidate)
            if path is not None and path.is_file():
                self.hidden.load(path, "delete it to compute the layers before it again")
                return candidate
        embed = self.source.read(self.source.geometry.names.embed)
        for start in range(0, self.hidden.shape[0], self.batch):
            self.hidden.put(start, torch.nn.functional.embedding(self.tokens[start : start + self.batch], embed))
        return 0

    def read_layer(self, layer: int) -> LayerWeights:
        """A layer's weights on the device, every rank reading its share."""
        return read_layer_shared(self.source, layer, self.device, self.dtype)

    def advance(self, weights: LayerWeights, observer: Observer | None = None) -> None:
        """Move through one layer with these weights."""
        for start, values in self.hidden.batches(self.batch, self.device):
            after = layer_forward(weights, self.source.geometry, values, observer)
            self.hidden.put(start, after, leaving(self.source.label, self.layer))
        self.layer += 1

    def save(self) -> None:
        """Checkpoint the stream as it enters `layer`; nothing at the embedding or beyond the disk limit."""
        path = self._path(self.layer)
        if path is None or self.layer == 0 or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.hidden.save(path)

    def keep_from(self, layer: int) -> None:
        """Delete this rank's checkpoints of layers before `layer`, and unfinished ones."""
        if self.folder is None:
            return
        for path in self.folder.glob(f".hidden-*{self._suffix}*"):
            if is_temporary(path.name) or int(path.name.split(".")[1].removeprefix("hidden-")) < layer:
                os.unlink(path)

    @property
    def _suffix(self) -> str:
        return f".{self.rank}of{self.size}"

    def _path(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f".hidden-{layer:03d}{self._suffix}"


def forget(folder: Path) -> None:
    """Delete the hidden states of all ranks that a finished run left in `folder`."""
    for path in folder.glob(".hidden-*"):
        path.unlink(missing_ok=True)


def batch_windows(context: int, device: torch.device | str) -> int:
    """Windows at a time: decided by the device's total memory alone, so that equal runs add in equal order."""
    device = torch.device(device)
    tokens = 8192
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        tokens = 131072 if total > 100e9 else 32768 if total > 40e9 else 8192
    return max(1, tokens // context)
