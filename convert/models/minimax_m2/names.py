"""Release names of the tensors of MiniMax-M2."""

from __future__ import annotations

from ..names import TensorNames

MOE = "block_sparse_moe"  # vLLM and transformers 5 call it mlp
PROJECTIONS = {"gate": "w1", "down": "w2", "up": "w3"}
NAMES = TensorNames(
    moe=MOE,
    plain={
        "input_norm": "input_layernorm.weight",
        "post_norm": "post_attention_layernorm.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "router": f"{MOE}.gate.weight",
        "router_bias": f"{MOE}.e_score_correction_bias",
    },
    projections=PROJECTIONS,
    sampled=("input_norm", "q_norm", "router_bias"),
    ignore=("lm_head", rf"re:.*{MOE}.gate$", r"re:.*mlp\.gate$", "re:.*embed_tokens$"),
    sglang={"gate": "gate_proj", "down": "down_proj", "up": "up_proj"},
)
CODE_FILES = ("configuration_minimax_m2.py", "modeling_minimax_m2.py")  # that config.json's auto_map may name
