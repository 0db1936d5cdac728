"""Weights of a model in memory: one decoder layer, and what stands outside the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .names import ATTENTION, PROJECTIONS, TensorNames

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """Dequantized weights of one decoder layer, [out, in]. Norms and router float32, the rest in the compute dtype.

    None is what the architecture does not have.
    """

    input_norm: Tensor  # [H]
    post_norm: Tensor  # [H]
    q_norm: Tensor | None  # [heads * head_dim], or [head_dim]
    k_norm: Tensor | None  # [kv_heads * head_dim], or [head_dim]
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    router: Tensor  # [E, H]
    router_bias: Tensor | None  # [E], selection only
    gate: Tensor  # [E, I, H]
    up: Tensor  # [E, I, H]
    down: Tensor  # [E, H, I]


@dataclass(frozen=True)
class Globals:
    """What stands outside the layers: embeddings [V, H], final norm [H], output head [V, H]."""

    embed: Tensor
    norm: Tensor
    head: Tensor


def layer_weights(
    names: TensorNames,
    plain: Callable[[str], Tensor],
    matrix: Callable[[str], Tensor],
    stacked: Callable[[str], Tensor],
) -> LayerWeights:
    """Assemble a layer by three readers.

    They read a plain tensor by its name in the layer, an attention matrix, and all experts' matrices of a projection.
    """
    read = {field: plain(name) for field, name in names.plain.items()}
    attention = {name[0]: matrix(name) for name in ATTENTION}
    experts = {projection: stacked(projection) for projection in PROJECTIONS}
    return LayerWeights(
        input_norm=read["input_norm"],
        post_norm=read["post_norm"],
        q_norm=read.get("q_norm"),
        k_norm=read.get("k_norm"),
        router=read["router"],
        router_bias=read.get("router_bias"),
        **attention,
        **experts,
    )
