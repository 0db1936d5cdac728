"""Map release tensor names to GGUF names and shapes (numpy order, as llama.cpp's loader expects).

Source: llama.cpp src/models/minimax-m2.cpp (809 tensors for 62 layers). Expert matrices of a layer are stacked into
one tensor per projection.
"""

from __future__ import annotations

import re

from mmquant.errors import InputError

from ..models.minimax_m2 import EMBED, FINAL_NORM, HEAD, Geometry, attention_name, expert_name
from ..models.minimax_m2.gguf import ARCH, ATTENTION_TENSORS, EXPERT_TENSORS, PLAIN_TENSORS

TOKEN_EMBD, OUTPUT_NORM, OUTPUT = "token_embd.weight", "output_norm.weight", "output.weight"
GLOBALS = {TOKEN_EMBD: EMBED, OUTPUT_NORM: FINAL_NORM, OUTPUT: HEAD}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def split_block(name: str) -> tuple[int | None, str]:
    """Split a name: "blk.3.attn_q.weight" -> (3, "attn_q.weight"); a name outside the layers -> (None, name)."""
    match = _BLOCK.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def release_name(name: str, expert: int | None = None) -> str:
    """Release name (with its suffix) of a GGUF tensor; stacked experts need the expert's number.

    Raises ValueError for a name that minimax-m2 does not have.
    """
    if name in GLOBALS:
        return GLOBALS[name]
    layer, rest = split_block(name)
    stem = rest.removesuffix(".weight")
    if layer is not None:
        if rest in PLAIN_TENSORS:
            return f"model.layers.{layer}.{PLAIN_TENSORS[rest]}"
        if stem in ATTENTION_TENSORS and rest != stem:
            return attention_name(layer, ATTENTION_TENSORS[stem]) + ".weight"
        if stem in EXPERT_TENSORS and rest != stem and expert is not None:
            return expert_name(layer, expert, EXPERT_TENSORS[stem]) + ".weight"
    raise InputError(f"{name}: not a tensor of {ARCH}")


def layer_shapes(geometry: Geometry, layer: int) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape of a layer's tensors, in the order in which they are written."""
    g, p = geometry, f"blk.{layer}."
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    return {
        p + "attn_norm.weight": (g.hidden,),
        p + "attn_q.weight": (q, g.hidden),
        p + "attn_k.weight": (kv, g.hidden),
        p + "attn_v.weight": (kv, g.hidden),
        p + "attn_output.weight": (g.hidden, q),
        p + "attn_q_norm.weight": (q,),
        p + "attn_k_norm.weight": (kv,),
        p + "ffn_norm.weight": (g.hidden,),
        p + "ffn_gate_inp.weight": (g.experts, g.hidden),
        p + "exp_probs_b.bias": (g.experts,),
        p + "ffn_gate_exps.weight": (g.experts, g.expert_width, g.hidden),
        p + "ffn_up_exps.weight": (g.experts, g.expert_width, g.hidden),
        p + "ffn_down_exps.weight": (g.experts, g.hidden, g.expert_width),
    }


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
