"""The models of an evaluation on their way through the layers, and what each loses against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from ..model.engine_like import Like
from ..model.forward import EXACT, Rounding
from ..model.hidden import HiddenStates
from .floors import ShuffledSums
from .metrics import jaccard

# Rows of a layer's loss, each a sum over the tokens of a domain or of a range of positions: squared error of the hidden
# state, squares of the reference's, overlap of the chosen experts, tokens counted, tokens that are not finite.
ERROR, ENERGY, OVERLAP, TOKENS, NONFINITE = range(5)
PLAIN_FIELDS = ("input_norm", "post_norm", "q_norm", "k_norm", "router", "router_bias")


@dataclass
class Subject:
    """A model on its way through the layers: the reference, a candidate, the same like an engine, or a noise floor.

    kind   "exact", the name of an engine's profile, or what a floor varies
    also   names of profiles that compute it alike
    of     the number of the candidate; -1: the reference
    like   how an engine or a floor computes it; None: exactly
    order  the windows in the order in which they are computed; None: as they are
    """

    label: str
    source: Source
    dtype: torch.dtype
    hidden: HiddenStates
    kind: str = "exact"
    of: int = -1
    like: Like | ShuffledSums | None = None
    order: Tensor | None = None
    also: tuple[str, ...] = ()
    layers: list[Tensor] = field(default_factory=list)

    def weights(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """A layer's matrices as this model multiplies them."""
        return weights if self.like is None else self.like.weights(self.source, layer, weights)

    def rounding(self, layer: int) -> Rounding:
        """What happens to the inputs of a layer's matrices."""
        return EXACT if self.like is None else self.like.layer(self.source, layer)

    def head(self) -> Rounding:
        """What happens to the head's input."""
        return EXACT if self.like is None else self.like.head(self.source)

    def batches(self, windows: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(numbers of the windows, their hidden states on the device: a copy), some at a time."""
        if self.order is None:
            for start, values in self.hidden.batches(windows, device):
                yield torch.arange(start, start + len(values)), values
            return
        for start in range(0, len(self.order), windows):
            index = self.order[start : start + windows]
            yield index, self.hidden.all()[index.to(self.hidden.all().device)].to(device)

    def put(self, index: Tensor, values: Tensor, where: str | None) -> None:
        """Store what left a layer; see HiddenStates.put."""
        if self.order is None:
            self.hidden.put(int(index[0]), values, where)
        else:
            stored = self.hidden.all()
            stored[index.to(stored.device)] = values.to(stored.device)


def recast(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """The matrices in another dtype."""
    names = (name for name in LayerWeights.__dataclass_fields__ if name not in PLAIN_FIELDS)
    return replace(weights, **{name: getattr(weights, name).to(dtype) for name in names})


def note(
    loss: Tensor,
    truth: Tensor,
    after: Tensor,
    before: Tensor | None,
    chosen: Tensor,
    columns: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Add one batch [B, T, H] to a layer's loss [5, columns].

    Tokens that are not finite are counted, and weigh nothing. before, chosen [N, K]: the reference's experts (None
    where they have other numbers) and this model's. columns: of each window [B] and of each position [T].
    """
    finite = torch.isfinite(after).all(-1)  # [B, T]
    keep = finite.unsqueeze(-1)
    overlap = (
        torch.full_like(finite, torch.nan, dtype=torch.float32)  # a pruned model's experts have other numbers
        if before is None
        else jaccard(before.to(chosen.device), chosen.to(torch.int16)).view(finite.shape)
    )
    parts = {
        ERROR: torch.where(keep, after - truth, 0.0).pow(2).sum(-1),
        ENERGY: torch.where(keep, truth, 0.0).pow(2).sum(-1),
        OVERLAP: torch.where(finite, overlap, 0.0),
        TOKENS: finite,
        NONFINITE: ~finite,
    }
    window, position = (torch.as_tensor(column) for column in columns)
    for row, values in parts.items():
        loss[row].index_add_(0, window, values.sum(1, dtype=torch.float64).cpu())
        loss[row].index_add_(0, position, values.sum(0, dtype=torch.float64).cpu())
