"""Bytes that a target leaves for weights, card and RAM apart: what a plan of types may spend."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.geometry import Geometry
from . import memory
from .targets import Target

STAGED_BITS = 4.5  # a weight, of experts that are staged on the card: the plan that is to be made is not known yet


@dataclass(frozen=True)
class Budgets:
    """Bytes of weights. cards: on all cards together (unified: 0); ram: in RAM, where llama.cpp keeps the embeddings.

    Attention, norms, routers and the head lie on the cards, and as many layers' experts as fit beside them.
    """

    cards: int
    ram: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.cards + self.ram


def weight_budgets(g: Geometry, target: Target, context: int, cache: str = "f16") -> Budgets:
    """What cache, buffers, runtimes and 1 GiB free on every device leave for a GGUF file at this context."""
    kv, compute = memory.kv_bytes(g, context, cache), memory.compute_bytes(g, context)
    if target.cards is None:
        return Budgets(0, max(0, target.ram_usable - kv - compute - memory.HOST_RUNTIME - memory.FREE))
    staging = int(g.experts * g.hidden * g.expert_width * STAGED_BITS / 8)
    own = compute + staging + memory.CUDA_RUNTIME + memory.FREE
    cards = target.cards.count * (target.cards.usable - own) - kv
    return Budgets(max(0, cards), max(0, target.ram_usable - memory.HOST_RUNTIME - memory.FREE))
