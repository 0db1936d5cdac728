"""Facts of the releases that are known without a network: what config.json says of sizes, how engines serve them."""

from __future__ import annotations

from typing import Any

from ..architecture import Serving

# config.json of MiniMaxAI/MiniMax-M2.7, as far as it decides sizes; --model with a folder or @REVISION reads the file.
M2_7: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "num_hidden_layers": 62,
    "hidden_size": 3072,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "intermediate_size": 1536,
    "vocab_size": 200064,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 196608,
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
}
RELEASES: dict[str, dict[str, Any]] = {"MiniMaxAI/MiniMax-M2.7": M2_7}
SERVING = Serving(
    vllm=("--tool-call-parser", "minimax_m2", "--reasoning-parser", "minimax_m2"),
    sglang=("--tool-call-parser", "minimax-m2", "--reasoning-parser", "minimax-append-think"),
    sampling={"temperature": 1.0, "top_p": 0.95, "top_k": 40},
    prompt="]~!b[]~b]system\n{system}[e~[\n]~b]user\n{prompt}[e~[\n]~b]ai\n<think>\n",
    thinking="The model thinks between `<think>` and `</think>`. Keep its thinking in the history that you send back.",
    markup=r"</?(?:think|tool_call|minimax:tool_call|invoke|parameter)\b[^>]*>|\]~!?b[\[\]]|\[e~\[",
    agents={"success": 1.0, "match": 0.988, "schema": 0.9976, "only_reasoning": 0.0, "language": 0.75, "scenario": 1.0},
    agents_of="MiniMax-M2.7 at MiniMax, May 2026, ten runs of other prompts",
    agents_source="https://github.com/MiniMax-AI/MiniMax-Provider-Verifier",
)
