"""Sum the router's choices: load, co-activation and margins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.forward import Routing, biased
from .layer import MARGIN_BINS
from .sums import spread


class RouterSums:
    """Load, co-activation and margins of one layer, as of `RoutingStatistics`.

    bias  [E] of the router, for selection only; None: it has none
    """

    def __init__(self, domains: int, experts: int, bias: Tensor | None, device: torch.device) -> None:
        self.experts, self.bias = experts, bias
        self.load = torch.zeros(domains, experts, device=device)
        self.coactivation = torch.zeros(experts, experts, device=device)
        self.margins = torch.zeros(MARGIN_BINS, device=device)

    def add(self, routing: Routing, domain: Tensor, good: Tensor | None) -> None:
        """Count a batch of N tokens; domain [N], good [N] bool: those that count (None: all)."""
        chosen = spread(torch.ones_like(routing.weights), routing.chosen, self.experts)
        if good is not None:
            chosen *= good[:, None]
        self.load += F.one_hot(domain, len(self.load)).float().T @ chosen
        self.coactivation += chosen.T @ chosen
        keep = routing.chosen.shape[1]
        if keep < self.experts:
            levels = biased(routing.scores, self.bias)
            last = levels.gather(1, routing.chosen).amin(1)
            gap = last - levels.scatter(1, routing.chosen, -torch.inf).amax(1)
            gap = gap if good is None else gap[good]
            place = torch.log2(gap.clamp(min=2.0**-40)).floor().long() + MARGIN_BINS
            self.margins += torch.bincount(place.clamp(0, MARGIN_BINS - 1), minlength=MARGIN_BINS)
