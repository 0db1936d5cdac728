"""GGUF facts of MiniMax-M2: architecture, tensor names, router and pre-tokenizer.

Source: llama.cpp src/models/minimax-m2.cpp, conversion/minimax.py.
"""

from __future__ import annotations

from .names import PLAIN_NAMES

ARCH = "minimax-m2"  # general.architecture, and the prefix of its keys
PRE = "minimax-m2"  # tokenizer.ggml.pre
SIGMOID = 2  # expert_gating_func
ATTENTION_TENSORS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
EXPERT_TENSORS = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
PLAIN_TENSORS = {  # never quantized
    "attn_norm.weight": PLAIN_NAMES["input_norm"],
    "attn_q_norm.weight": PLAIN_NAMES["q_norm"],
    "attn_k_norm.weight": PLAIN_NAMES["k_norm"],
    "ffn_norm.weight": PLAIN_NAMES["post_norm"],
    "ffn_gate_inp.weight": PLAIN_NAMES["router"],
    "exp_probs_b.bias": PLAIN_NAMES["router_bias"],
}
# What `tokenizer.ggml.pre` = minimax-m2 stands for: the pattern of the release's tokenizer.json.
_MARKS = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_MARKS[0]}]*[{_MARKS[1]}]+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_MARKS[0]}]+[{_MARKS[1]}]*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
