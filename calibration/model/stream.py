"""Carry the residual stream through the layers: embed, advance, checkpoint, restore or replay."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from mmquant.errors import InputError
from mmquant.stages import stage

from ...convert.files.atomic import is_temporary
from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from .distributed import current_ranks, rank_device, rank_share, world
from .embedded import embedded
from .forward import Observer, layer_forward
from .hidden import RAM_LIMIT, HiddenStates, leaving, place_of
from .parts import Saved, Saver, find_parts, load_parts, part_path
from .reading import read_layer_shared

DISK_LIMIT = 64 << 30


class Streaming(ABC):
    """What goes through the layers with one stream, made when it is first asked for."""

    @cached_property
    def stream(self) -> Stream:
        """The residual stream; its memory is taken when it is first used."""
        return self.make_stream()

    @abstractmethod
    def make_stream(self) -> Stream:
        """The stream before its first layer."""

    def settle(self) -> None:
        """Wait until what was saved of the stream is durable."""
        if "stream" in self.__dict__:
            self.stream.settle()

    def stop(self) -> None:
        """Save nothing more."""
        if "stream" in self.__dict__:
            self.stream.stop()


class Stream:
    """The hidden states of one rank's windows; `layer` is the layer that they enter next.

    Checkpoints (parts.py), one file for each layer and rank, are kept in `folder` when their bytes (twice, for the
    exchange) stay within `disk_limit`; without one, a later start replays the layers before it, with the same result.
    """

    def __init__(
        self,
        source: Source,
        tokens: Tensor,
        *,
        own: range | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int | None = None,
        folder: Path | None = None,
        ram_limit: int = RAM_LIMIT,
        disk_limit: int = DISK_LIMIT,
    ) -> None:
        """tokens [W, T]: of all windows; own: this rank's, by default its share; batch: windows at a time."""
        self.windows = len(tokens)
        self.own = rank_share(self.windows, *world()) if own is None else own
        tokens = tokens[self.own.start : self.own.stop]
        self.source, self.tokens, self.dtype = source, tokens, dtype
        self.device = rank_device(device)
        self.batch = batch if batch is not None else batch_windows(tokens.shape[1], self.device)
        windows, length = tokens.shape
        channels = source.geometry.hidden
        place = place_of(self.device, 4 * windows * length * channels)
        self.hidden = HiddenStates(windows, length, channels, ram_limit, folder, place)
        kept = 2 * 4 * self.windows * length * channels  # by all ranks
        self.folder = folder if kept <= disk_limit else None
        self.layer, self._saver = -1, Saver()

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
        """Take the latest checkpoint not behind `layer` that all ranks have, or the embedding; the layer entered."""
        found = {n: saved for n in range(layer, 0, -1) if (saved := self._saved(n)) is not None}
        common = set[int].intersection(*(set(numbers) for numbers in current_ranks().gather(list(found))))
        if common:
            latest = max(common)
            remedy = "delete it to compute the layers before it again"
            load_parts(found[latest], {"hidden": self.hidden}, self.own, remedy)
            return latest
        for start, values in embedded(self.source, self.tokens, self.batch):
            self.hidden.put(start, values)
        return 0

    def _saved(self, layer: int) -> Saved | None:
        if self.folder is None:
            return None
        return find_parts(self.folder, _stem(layer), self.own, self.windows)

    def read_layer(self, layer: int) -> LayerWeights:
        """A layer's weights on the device, every rank reading its share."""
        return read_layer_shared(self.source, layer, self.device, self.dtype)

    def advance(self, weights: LayerWeights, observer: Observer | None = None) -> None:
        """Move through one layer with these weights."""
        for start, values in self.hidden.batches(self.batch, self.device):
            with stage("forward"):
                after = layer_forward(weights, self.source.geometry, values, observer)
            self.hidden.put(start, after, leaving(self.source.label, self.layer))
        self.layer += 1

    def save(self) -> None:
        """Checkpoint the stream as it enters `layer`; nothing at the embedding or beyond the disk limit.

        From a device it is saved behind the pass: `settle` waits for it.
        """
        if self.folder is not None and self.layer > 0:
            self._saver.save(self.folder, _stem(self.layer), {"hidden": self.hidden}, self.own, self.windows)

    def settle(self) -> None:
        """Wait until what was saved is durable."""
        self._saver.settle()

    def stop(self) -> None:
        """Save nothing more; a run that failed goes on from what is there."""
        self._saver.stop()

    def keep_from(self, layer: int) -> None:
        """Delete checkpoints of layers before `layer`, and unfinished ones: this rank's; the first rank's call, all."""
        if self.folder is not None:
            self._saver.then(partial(self._delete, self.folder, layer))

    def _delete(self, folder: Path, layer: int) -> None:
        first, mine = world()[0] == 0, part_path(folder, "", self.own, self.windows).name
        for path in folder.glob(".hidden-*"):
            number = re.match(r"\.hidden-(\d+)(?!.*-)", path.name)
            if number is None or not (first or mine in path.name):
                continue
            if is_temporary(path.name) or int(number[1]) < layer:
                path.unlink(missing_ok=True)


def _stem(layer: int) -> str:
    return f".hidden-{layer:03d}"


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
