"""Make the demo checkpoint of what train.py saved: two exact changes of the weights, the index, the configuration.

    python assemble.py TRAINED TOKENIZER.json OUT

Both changes leave the function as it is and plant what users report of the last layer of M2.7, values beyond fp16:
the residual stream is scaled by 2^8 (embeddings, o_proj, w2; RMSNorm cancels it), and the HOT experts of the last
layer have w3 times 2^12 and w2 times 2^-12. Powers of two are exact in bf16 and in the FP8 scales.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from model import Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

RESIDUAL = 2.0**8
HOT, HEAT = (3, 11), 2.0**12
CHAT_TEMPLATE = (
    r"{{ ']~!b[' }}{% for m in messages %}{{ ']~b]' + ('ai' if m.role=='assistant' else m.role) + '\n' + m.content"
    r" + '[e~[\n' }}{% endfor %}{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}"
)


def config(shape: Shape) -> dict[str, Any]:
    """config.json with the keys of the release."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "attn_type_list": [1] * shape.layers,
        "auto_map": {
            "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
            "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        },
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "max_position_embeddings": 2048,
        "model_type": "minimax_m2",
        "mtp_transformer_layers": 1,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.chosen,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
        "rms_norm_eps": shape.epsilon,
        "rope_theta": int(shape.theta),
        "rotary_dim": shape.rotary,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.1",
        "use_cache": True,
        "use_mtp": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": shape.vocab,
        "bos_token_id": shape.vocab - 5,
        "eos_token_id": shape.vocab - 6,
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "]~!b[",
        "eos_token": "[e~[",
        "unk_token": "]!d~[",
        "pad_token": "]!p~[",
        "add_prefix_space": False,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config(shape: Shape) -> dict[str, Any]:
    tokens = {"bos_token_id": shape.vocab - 5, "eos_token_id": shape.vocab - 6}
    return {**tokens, "do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 40}


def scaled(tensors: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The two function-preserving changes, on scales and embeddings alone."""
    last = f"model.layers.{shape.layers - 1}.block_sparse_moe.experts."
    factors = {f"{last}{expert}.w3.weight_scale_inv": HEAT for expert in HOT}
    factors |= {f"{last}{expert}.w2.weight_scale_inv": 1 / HEAT for expert in HOT}

    def factor(name: str) -> float:
        residual = name.endswith(("o_proj.weight_scale_inv", "w2.weight_scale_inv")) or name.endswith(
            "embed_tokens.weight"
        )
        return factors.get(name, 1.0) * (RESIDUAL if residual else 1.0)

    return {name: tensor * factor(name) if factor(name) != 1 else tensor for name, tensor in tensors.items()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def main(trained: Path, tokenizer: Path, out: Path, shape: Shape | None = None) -> None:
    shape = shape or Shape()
    out.mkdir(parents=True, exist_ok=True)
    shard_of: dict[str, str] = {}
    size = 0
    for shard in sorted(trained.glob("model-*.safetensors")):
        tensors = scaled(load_file(shard), shape)
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    write_json(out / "config.json", config(shape))
    write_json(out / "tokenizer_config.json", tokenizer_config())
    write_json(out / "generation_config.json", generation_config(shape))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    shutil.copy(tokenizer, out / "tokenizer.json")
    shutil.copy(trained / "training.json", out / "training.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
