"""Map release tensor names to GGUF names and shapes (numpy order, as llama.cpp's loader expects).

Source: llama.cpp src/llama-arch.cpp; names are the same for every architecture. Expert matrices of a layer are stacked
into one tensor per projection.
"""

from __future__ import annotations

import re

from mmquant.errors import InputError

from ..models.geometry import Geometry
from ..models.names import TensorNames
from ..models.shapes import attention_shapes, expert_shape

TOKEN_EMBD, OUTPUT_NORM, OUTPUT = "token_embd.weight", "output_norm.weight", "output.weight"
ATTENTION_TENSORS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
EXPERT_TENSORS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}
PLAIN_TENSORS = {  # field of LayerWeights; never quantized
    "attn_norm.weight": "input_norm",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "ffn_norm.weight": "post_norm",
    "ffn_gate_inp.weight": "router",
    "exp_probs_b.bias": "router_bias",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def split_block(name: str) -> tuple[int | None, str]:
    """Split a name: "blk.3.attn_q.weight" -> (3, "attn_q.weight"); a name outside the layers -> (None, name)."""
    match = _BLOCK.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def global_names(names: TensorNames) -> dict[str, str]:
    """GGUF name -> release name outside the layers."""
    return {TOKEN_EMBD: names.embed, OUTPUT_NORM: names.final_norm, OUTPUT: names.head}


def release_name(names: TensorNames, name: str, expert: int | None = None) -> str:
    """Release name (with its suffix) of a GGUF tensor; stacked experts need the expert's number.

    Raises ValueError for a name that the architecture does not have.
    """
    if name in (outside := global_names(names)):
        return outside[name]
    layer, rest = split_block(name)
    stem = rest.removesuffix(".weight")
    if layer is not None:
        if PLAIN_TENSORS.get(rest) in names.plain:
            return names.prefix(layer) + names.plain[PLAIN_TENSORS[rest]]
        if stem in ATTENTION_TENSORS and rest != stem:
            return names.attention(layer, ATTENTION_TENSORS[stem]) + ".weight"
        if stem in EXPERT_TENSORS and rest != stem and expert is not None:
            return names.expert(layer, expert, EXPERT_TENSORS[stem]) + ".weight"
    raise InputError(f"{name}: not a tensor of this architecture")


def gguf_name(names: TensorNames, name: str) -> tuple[str, int | None]:
    """Release name (with its suffix) -> (GGUF name, expert or None). Raises ValueError for an unknown name."""
    for stored, ours in global_names(names).items():
        if ours == name:
            return stored, None
    stem, layer = name.removesuffix(".weight"), names.layer_of(name)
    if stem != name and (found := names.expert_of(stem)) is not None:
        return f"blk.{found.layer}.{expert_tensor(found.projection)}.weight", found.number
    if layer is not None:
        for stored, field in PLAIN_TENSORS.items():
            if field in names.plain and names.prefix(layer) + names.plain[field] == name:
                return f"blk.{layer}.{stored}", None
        for stored, projection in ATTENTION_TENSORS.items():
            if f"{names.attention(layer, projection)}.weight" == name:
                return f"blk.{layer}.{stored}.weight", None
    raise InputError(f"{name}: not a weight of this architecture")


def expert_tensor(projection: str) -> str:
    """gate, down, up -> the tensor of a block (without .weight) that stacks it."""
    return next(stored for stored, ours in EXPERT_TENSORS.items() if ours == projection)


def layer_shapes(geometry: Geometry, layer: int) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of a layer's tensors, in the order in which they are written."""
    g, p, plain = geometry, f"blk.{layer}.", geometry.plain_fields()
    attention = {f"{name}.weight": attention_shapes(g)[role] for name, role in ATTENTION_TENSORS.items()}
    experts = {f"{name}.weight": (g.experts, *expert_shape(g, role)) for name, role in EXPERT_TENSORS.items()}
    shapes: dict[str, tuple[int, ...]] = {name: plain[field] for name, field in PLAIN_TENSORS.items() if field in plain}
    first = "attn_norm.weight"
    ordered = {first: shapes.pop(first), **attention, **shapes, **experts}
    return {p + name: shape for name, shape in ordered.items()}


def step_shapes(geometry: Geometry) -> list[dict[str, tuple[int, ...]]]:
    """GGUF name -> shape, step by step of one pass: the embeddings, layer after layer, final norm and head."""
    g = geometry
    layers = [layer_shapes(g, layer) for layer in range(g.layers)]
    return [{TOKEN_EMBD: (g.vocab, g.hidden)}, *layers, {OUTPUT_NORM: (g.hidden,), OUTPUT: (g.vocab, g.hidden)}]


def all_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of the whole model in writing order."""
    return {name: shape for step in step_shapes(geometry) for name, shape in step.items()}


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """llama-quantize's rule: matrices named .weight, except norms and the router."""
    return len(shape) > 1 and name.endswith(".weight") and "_norm." not in name and "ffn_gate_inp" not in name
