"""The largest sums of 32 inputs of every expert's down projection, by running text through the file itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..convert.minimax_m2 import EMBED
from ..convert.source import Source, read_layer
from .forward import Observer, layer_forward
from .stream import batch_windows


class Largest(Observer):
    """Largest |sum over an aligned block of 32 inputs of w2| by expert [E]."""

    def __init__(self, experts: int) -> None:
        self.sums = torch.zeros(experts)

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        sums = h.float().unflatten(1, (-1, 32)).sum(-1).abs().amax(1).cpu()
        for expert in range(len(offsets) - 1):
            rows = sums[offsets[expert] : offsets[expert + 1]]
            if len(rows):
                self.sums[expert] = torch.maximum(self.sums[expert], rows.amax())


def largest_sums(source: Source, tokens: Tensor, device: torch.device | str) -> Tensor:
    """[L, E] for windows [W, T] of tokens; one layer in memory at a time."""
    g, batch = source.geometry, batch_windows(tokens.shape[1], device)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    hidden = torch.nn.functional.embedding(tokens, source.read(EMBED))
    found = []
    for layer in range(g.layers):
        weights, watch = read_layer(source, layer, device, dtype), Largest(g.experts)
        hidden = torch.cat([layer_forward(weights, g, part.to(device), watch).cpu() for part in hidden.split(batch)])
        found.append(watch.sums)
    return torch.stack(found)
