"""What a GGUF plan chooses for: every matrix of the file, and the types that it may have."""

from __future__ import annotations

from ...convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, TOKEN_EMBD, all_shapes, is_quantizable
from ...convert.models.geometry import Geometry
from ...quantize.ggml.types import GGMLType
from ..gguf.layer import ROLES

# Types from small to large that are best at their size somewhere; IQ1 is never (docs/plan.md).
LADDER = (
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
SMALL_BLOCKS = ("Q4_0", "IQ4_NL", "Q5_0", "Q8_0")  # for rows that 256 does not divide
EMBEDDINGS = ("Q2_K", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # what is looked up, not multiplied
# Products with these read a table for each few weights: slow on a CPU (llama.cpp's own kernels, docs/plan.md).
SLOW_ON_CPU = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
FIELDS = {name: ROLES[role] for name, role in ATTENTION_TENSORS.items()} | EXPERT_TENSORS  # of LayerWeights


def group_shapes(g: Geometry) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of everything that has a choice, in writing order."""
    return {name: shape for name, shape in all_shapes(g).items() if is_quantizable(name, shape)}


def group_of(layer: int, name: str) -> str:
    """The GGUF name of a layer's matrix."""
    return f"blk.{layer}.{name}.weight"


def kinds_of(name: str, columns: int) -> tuple[str, ...]:
    """Types that a matrix of rows of `columns` may have, from small to large."""
    wanted = EMBEDDINGS if name == TOKEN_EMBD else LADDER
    fitting = tuple(kind for kind in wanted if GGMLType[kind].fits(columns))
    return fitting if len(fitting) > 1 else tuple(kind for kind in SMALL_BLOCKS if GGMLType[kind].fits(columns))


def bits_of(kind: str) -> float:
    """Bits of storage for a weight, scales included."""
    return 8 * GGMLType[kind].block_bytes / GGMLType[kind].block_columns


def probes_of(kinds: tuple[str, ...], probes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `kinds` that are measured to the end: `probes`, or where a group lacks them its neighbours in size."""
    near = (min(kinds, key=lambda kind: abs(bits_of(kind) - bits_of(wanted))) for wanted in probes)
    return tuple(dict.fromkeys(near))
