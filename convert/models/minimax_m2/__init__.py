"""MiniMax-M2: everything that is said of this architecture alone. Its row in the table is `ARCHITECTURE` in row.py."""

from .geometry import Geometry
from .layer import Globals, LayerWeights, layer_weights
from .names import (
    ATTENTION,
    EMBED,
    FINAL_NORM,
    HEAD,
    PROJECTIONS,
    attention_name,
    attention_shapes,
    expert_name,
    expert_shape,
    global_shapes,
    is_mtp,
    kind_of,
    layer_of,
    layer_prefix,
    matrix_shapes,
    plain_shapes,
)

__all__ = [
    "ATTENTION",
    "EMBED",
    "FINAL_NORM",
    "HEAD",
    "PROJECTIONS",
    "Geometry",
    "Globals",
    "LayerWeights",
    "attention_name",
    "attention_shapes",
    "expert_name",
    "expert_shape",
    "global_shapes",
    "is_mtp",
    "kind_of",
    "layer_of",
    "layer_prefix",
    "layer_weights",
    "matrix_shapes",
    "plain_shapes",
]
