"""Bytes that a target leaves for weights, card and RAM apart: what a plan of types may spend."""

from __future__ import annotations

from dataclasses import dataclass

from mmquant.errors import InputError

from ..models.geometry import Geometry
from . import memory
from .placement import parallel_fault
from .targets import Target

NO_CUDA = "INT4's and FP4's kernels need CUDA"
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


def folder_budget(g: Geometry, target: Target, context: int, cache: str = "f16") -> int:
    """Bytes of weights of a folder for vLLM on all cards together, at this context; 1 GiB stays free on each.

    InputError for a target without cards, and for a number of cards over which the model does not divide.
    """
    if target.cards is None:
        raise InputError(f"--target {target.id}: vLLM needs cards, expected such as 2xA100-80GB")
    cards = target.cards
    if cards.amd:
        raise InputError(f"--target {target.id}: {NO_CUDA}")
    if fault := parallel_fault(g, cards.count):
        raise InputError(f"--target {target.id}: {fault}")
    kv = -(-memory.kv_bytes(g, context, cache) // min(cards.count, g.kv_heads))
    own = kv + memory.VLLM_ACTIVATIONS + memory.VLLM_RUNTIME + memory.FREE
    return cards.count * (int(cards.usable * memory.VLLM_SHARE) - own)


def unified_budget(g: Geometry, target: Target, context: int, cache: str = "f16") -> int:
    """The same for mlx_lm in unified memory. InputError for a target without it."""
    if not target.unified:
        raise InputError(f"--target {target.id}: mlx_lm needs a Mac's unified memory, expected such as 128GB-unified")
    kv = memory.kv_bytes(g, context, cache)
    return target.ram_usable - kv - memory.MLX_COMPUTE - memory.HOST_RUNTIME - memory.FREE
