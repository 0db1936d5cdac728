"""Measure the largest block sums of every expert's down projection input by running the GGUF file itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...convert.source import Source, read_layer
from ..model.forward import Observer, layer_forward
from ..model.stream import batch_windows


class Largest(Observer):
    """Largest |sum over an aligned block of inputs of down| by expert [E]; `block` inputs a sum."""

    def __init__(self, experts: int, block: int = 32) -> None:
        self.sums, self.block = torch.zeros(experts), block

    def experts(self, x: Tensor, h: Tensor, y: Tensor, token: Tensor, slot: Tensor, offsets: list[int]) -> None:
        """Keep the largest sum of each expert's inner rows."""
        sums = h.float().unflatten(1, (-1, self.block)).sum(-1).abs().amax(1).cpu()
        for expert in range(len(offsets) - 1):
            rows = sums[offsets[expert] : offsets[expert + 1]]
            if len(rows):
                self.sums[expert] = torch.maximum(self.sums[expert], rows.amax())


def largest_sums(source: Source, tokens: Tensor, device: torch.device | str, blocks: Sequence[int]) -> Tensor:
    """[L, E] for windows [W, T] of tokens, sums of blocks[layer] inputs; one layer in memory at a time."""
    g, batch = source.geometry, batch_windows(tokens.shape[1], device)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    hidden = torch.nn.functional.embedding(tokens, source.read(g.names.embed))
    found = []
    for layer, block in enumerate(blocks):
        weights, watch = read_layer(source, layer, device, dtype), Largest(g.experts, block)
        hidden = torch.cat([layer_forward(weights, g, part.to(device), watch).cpu() for part in hidden.split(batch)])
        found.append(watch.sums)
    return torch.stack(found)
