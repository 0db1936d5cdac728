"""Mixtral as a row of the table of architectures: no norms of q and k, softmax routing without a bias.

Source: transformers models/mixtral, llama.cpp src/models/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from helpers import qwen3_moe
from mmquant.convert.models import geometry as base
from mmquant.convert.models.architecture import Architecture
from mmquant.convert.models.geometry import LayerRules, read_sizes
from mmquant.convert.models.minimax_m2.names import NAMES as MINIMAX
from mmquant.convert.models.minimax_m2.row import ARCHITECTURE

PLAIN = ("input_norm", "post_norm", "router")
NAMES = replace(MINIMAX, plain={field: MINIMAX.plain[field] for field in PLAIN}, sampled=PLAIN)


@dataclass(frozen=True)
class Geometry(base.Geometry):
    """Sizes of a Mixtral checkpoint."""

    @property
    def architecture(self) -> Architecture:
        return ROW


ROW = replace(
    ARCHITECTURE,
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    geometry=lambda config: Geometry(**read_sizes(config, "num_local_experts", "intermediate_size")),
    names=NAMES,
    rules=LayerRules(scoring="softmax", qk_norm=None),
)
CONFIG: dict[str, Any] = qwen3_moe.CONFIG | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 96,
    "num_local_experts": 5,
}
