"""Cut other tools' checkpoints of a small random MiniMax-M2 to layer 0, four experts and 128 tokens.

    python tests/data/make_golden.py FULL tests/data/golden

FULL holds a folder a checkpoint (see golden/README.md for who wrote them). Tensors are cut, never changed: experts 4
and up and layer 1 are left out, router rows, embedding and head rows are cut; config.json says so.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LAYERS, EXPERTS, VOCAB = 1, 4, 128
CHECKPOINTS = (
    "source-bf16",
    "loads-native-fp8-block",
    "loads-ct-mix-attnfp8-expw4",
    "peer-llmc-mf-fp8-block",
    "peer-llmc-mf-fp8-dynamic",
    "peer-llmc-mf-w4a16-g128-sym",
    "peer-llmc-mf-w4a16-g128-asym",
    "peer-llmc-mf-mxfp4a16",
    "peer-llmc-mf-nvfp4a16",
    "peer-autoround-awq-g128",
    "peer-autoround-gptq-g128",
)


def cut(name: str, tensor: Tensor) -> Tensor | None:
    """The part of a tensor that the small model keeps; None for a tensor that it has no use for."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    if (layer and int(layer[1]) >= LAYERS) or (expert and int(expert[1]) >= EXPERTS):
        return None
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return tensor[:VOCAB].clone()
    if name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias")):
        return tensor[:EXPERTS].clone()
    return tensor


def cut_checkpoint(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Tensor] = {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = cut(name, file.get_tensor(name))
            if tensor is not None:
                kept[name] = tensor.contiguous()
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, "vocab_size": VOCAB}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    for checkpoint in CHECKPOINTS:
        cut_checkpoint(Path(sys.argv[1]) / checkpoint, Path(sys.argv[2]) / checkpoint)
