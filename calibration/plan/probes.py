"""Probe streams: the judged text through a model of which one matrix is rounded, and what that costs in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...convert.models.geometry import Geometry
from ...convert.models.layer import Globals, LayerWeights
from ..evaluate.metrics import log_softmax
from ..model.forward import final_logits, layer_forward
from ..model.hidden import RAM_LIMIT, HiddenStates

LOGIT_BYTES = 1 << 26  # float32 logits of one stream that are held at once
Probe = tuple[str, str]  # group and type


@dataclass(frozen=True)
class Block:
    """The streams of several probes one after the other: windows [len(names) * W, T, H]."""

    names: list[Probe]
    hidden: HiddenStates


class Probes:
    """The exact stream of W judged windows and those of all probes so far, advanced together layer by layer."""

    def __init__(self, tokens: Tensor, g: Geometry, device: torch.device | str, batch: int, folder: Path | None):
        self.tokens, self.g, self.device, self.batch, self.folder = tokens, g, device, batch, folder
        self.exact = self._states(1)
        self.blocks: list[Block] = []

    def _states(self, count: int) -> HiddenStates:
        windows, length = self.tokens.shape
        used = sum(block.hidden.bytes for block in getattr(self, "blocks", []) if not block.hidden.on_disk)
        return HiddenStates(count * windows, length, self.g.hidden, max(0, RAM_LIMIT - used), self.folder)

    def open(self, names: list[Probe]) -> Block:
        """Room for probes that begin here."""
        block = Block(names, self._states(len(names)))
        self.blocks.append(block)
        return block

    def fill(self, block: Block, index: int, weights: LayerWeights) -> None:
        """Probe `index` of a block leaves the layer whose one matrix is rounded in `weights`."""
        for start, hidden in self.exact.batches(self.batch, self.device):
            block.hidden.put(index * len(self.tokens) + start, layer_forward(weights, self.g, hidden))

    def advance(self, weights: LayerWeights, newest: Block) -> None:
        """All but the newest block, and the exact stream, through a layer as it is."""
        for states in (self.exact, *(block.hidden for block in self.blocks if block is not newest)):
            for start, hidden in states.batches(self.batch, self.device):
                states.put(start, layer_forward(weights, self.g, hidden))

    def streams(self) -> Iterator[tuple[Probe, HiddenStates, int]]:
        """(probe, states, its first window in them)."""
        for block in self.blocks:
            for index, name in enumerate(block.names):
                yield name, block.hidden, index * len(self.tokens)

    def judge(self, outside: Globals, heads: dict[Probe, Tensor]) -> dict[Probe, list[float]]:
        """Mean KLD of every window, by probe; heads: rounded ones, each a probe on the exact stream."""
        sums: dict[Probe, list[float]] = {}
        streams = [(name, states, first, outside.head) for name, states, first in self.streams()]
        streams += [(name, self.exact, 0, head) for name, head in heads.items()]
        rows = max(1, LOGIT_BYTES // (4 * self.g.vocab))
        for window in range(len(self.tokens)):
            parts: dict[Probe, list[np.ndarray]] = {name: [] for name, *_ in streams}
            for start in range(0, self.tokens.shape[1], rows):
                base = log_softmax(self._logits(self.exact, window, start, rows, outside))
                for name, states, first, head in streams:
                    model = Globals(outside.embed, outside.norm, head)
                    other = log_softmax(self._logits(states, first + window, start, rows, model))
                    parts[name].append((base.exp() * (base - other)).sum(-1).clamp(min=0).cpu().numpy())
            for name, found in parts.items():
                sums.setdefault(name, []).append(float(np.concatenate(found).mean()))
        return sums

    def _logits(self, states: HiddenStates, window: int, start: int, rows: int, model: Globals) -> Tensor:
        return final_logits(model, self.g, states.all()[window, start : start + rows].to(self.device))
