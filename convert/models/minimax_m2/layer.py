"""Weights of a MiniMax-M2 model in memory: one decoder layer, and what stands outside the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .names import ATTENTION, PLAIN_NAMES

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """Dequantized weights of one decoder layer, [out, in]. Norms and router float32, the rest in the compute dtype."""

    input_norm: Tensor  # [H]
    post_norm: Tensor  # [H]
    q_norm: Tensor  # [heads * head_dim]
    k_norm: Tensor  # [kv_heads * head_dim]
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    router: Tensor  # [E, H]
    router_bias: Tensor  # [E], selection only
    w1: Tensor  # [E, I, H] gate
    w3: Tensor  # [E, I, H] up
    w2: Tensor  # [E, H, I] down


@dataclass(frozen=True)
class Globals:
    """What stands outside the layers: embeddings [V, H], final norm [H], output head [V, H]."""

    embed: Tensor
    norm: Tensor
    head: Tensor


def layer_weights(
    plain: Callable[[str], Tensor], matrix: Callable[[str], Tensor], stacked: Callable[[str], Tensor]
) -> LayerWeights:
    """Assemble a layer by three readers.

    They read a plain tensor by its name in the layer, an attention matrix, and all experts' matrices of a projection.
    """
    return LayerWeights(
        **{field: plain(name) for field, name in PLAIN_NAMES.items()},
        **{name[0]: matrix(name) for name in ATTENTION},
        **{projection: stacked(projection) for projection in ("w1", "w3", "w2")},
    )
