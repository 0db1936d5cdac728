"""The noise floor: what differs when nothing differs but the order of sums, of windows, or the compute dtype.

A matrix product with its input channels in another order is the same in exact arithmetic. So a seed stands for another
kernel, and the windows in another order and other batches for another moment in an engine's queue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...convert.models.layer import LayerWeights
from ...convert.source import Source
from ..model.forward import EXACT, Rounding

ENTERING = ("q", "k", "v", "gate", "up")  # their inputs are hidden channels


@dataclass(frozen=True)
class ShuffledSums:
    """Every matrix product of a layer adds its terms in an order that `seed` draws."""

    seed: int

    def _orders(self, source: Source, device: torch.device) -> dict[str, Tensor]:
        g = source.geometry
        drawn = torch.Generator().manual_seed(self.seed)
        sizes = {"hidden": g.hidden, "o": g.heads * g.head_dim, "down": g.expert_width}
        orders = {name: torch.randperm(size, generator=drawn).to(device) for name, size in sizes.items()}
        return {**dict.fromkeys(ENTERING, orders["hidden"]), "o": orders["o"], "down": orders["down"]}

    def weights(self, source: Source, layer: int, weights: LayerWeights) -> LayerWeights:
        """Columns in the drawn order."""
        del layer
        orders = self._orders(source, weights.q.device)
        return replace(weights, **{name: getattr(weights, name)[..., order] for name, order in orders.items()})

    def layer(self, source: Source, layer: int) -> Rounding:
        """Inputs in the drawn order."""
        del layer
        orders = self._orders(source, torch.device("cpu"))
        return {name: _Reordered(order) for name, order in orders.items()}

    def head(self, source: Source) -> Rounding:
        """The head's sums stay as they are."""
        del source
        return EXACT


@dataclass(frozen=True)
class _Reordered:
    order: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x[..., self.order.to(x.device)]


def window_order(windows: int, number: int) -> Tensor:
    """The windows as the `number`-th other order has them: [windows] int64."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(number))
