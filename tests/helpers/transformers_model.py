"""A checkpoint as transformers has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.source import read_layer


def in_transformers(source: Checkpoint) -> Any:
    """The model in float32, its experts filled from our reader of layers."""
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in source.config.items() if k not in ("quantization_config", "auto_map")}
    model = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**config)).float().eval()
    state = {}
    for name in source.tensors:
        if not name.endswith("scale_inv") and ".experts." not in name:
            state[name.replace("block_sparse_moe", "mlp")] = source.read(name)
    for number in range(source.geometry.layers):
        layer = read_layer(source, number)
        state[f"model.layers.{number}.mlp.experts.gate_up_proj"] = torch.cat((layer.gate, layer.up), 1)
        state[f"model.layers.{number}.mlp.experts.down_proj"] = layer.down
    model.load_state_dict(state, strict=True)
    return model
