"""A small random native-FP8 MiniMax-M2 checkpoint with awkward sizes: not square, not multiples of the tile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmquant.convert.models import architecture_of
from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes
from mmquant.convert.open import demo_folder
from mmquant.quantize.fp8 import quantize_tiles

CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of the release's names; expert 0 of layer 0 has a dead row and a dead tile."""
    generator = torch.Generator().manual_seed(seed)
    geometry = architecture_of(config).geometry(config)
    tensors: dict[str, torch.Tensor] = {}

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    for name, shape in global_shapes(geometry).items():
        tensors[name] = (draw(shape, 0.1) + (1.0 if "norm" in name else 0.0)).to(torch.bfloat16)
    for layer in range(geometry.layers):
        for name, shape in plain_shapes(geometry, layer):
            value = draw(shape, 0.05) + (1.0 if "norm" in name else 0.0)
            tensors[name] = value.to(torch.bfloat16) if "norm" in name else value
        for name, shape in matrix_shapes(geometry, layer):
            weight = draw(shape, 0.08)
            if layer == 0 and ".experts.0." in name:
                weight[1] = 0
                weight[128:, 128:] = 0
            if config.get("quantization_config") is None:
                tensors[name + ".weight"] = weight.to(torch.bfloat16)
            else:
                tensors[name + ".weight"], tensors[name + ".weight_scale_inv"] = quantize_tiles(weight)
    return tensors


def write_tiny(folder: Path, shards: int = 3, seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint into `folder` in `shards` files with an index; `changes` override config.json's keys."""
    config = {**CONFIG, **changes}
    tensors = tiny_tensors(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    table: dict[str, str] = {}
    for index in range(shards):
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        shard = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        table |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenized(folder: Path, **sizes: Any) -> Path:
    """A checkpoint of two layers and four experts with the demo's tokenizer."""
    write_tiny(folder, num_local_experts=4, num_hidden_layers=2, vocab_size=2048, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, folder)
    return folder


def write_code(path: Path) -> Path:
    """A text of 900 small functions, no two alike."""
    path.write_text("".join(f"def f{i}(x, y={i}):\n    return x * {i} + y[{i % 7}]\n" for i in range(900)))
    return path


def few(model: Path, text: Path) -> list[str]:
    """The words of a command that calibrates on a few windows of the text."""
    return ["--model", str(model), "--text", str(text), "--text-only", "--windows", "12", "--context", "64"]
