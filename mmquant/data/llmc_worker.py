"""Quantize by llm-compressor, run by its own Python with one JSON argument; imports nothing of mmquant.

{"model", "out", "scheme", "group_size" (null: the preset's), "ignore", "device", "tile" (null: not in FP8 tiles)}
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any


def main(job: dict[str, Any]) -> None:
    """model_free_ptq of a folder, its FP8 tiles dequantized on the way."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from llmcompressor import model_free_ptq

    scheme: Any = preset_name_to_scheme(job["scheme"], ["Linear"])
    size = job["group_size"]
    if size is not None:
        scheme.weights.strategy = "channel" if size == -1 else "group"
        scheme.weights.group_size = None if size == -1 else size
    tiles = None
    if job["tile"] is not None:
        targets = [r"re:.*self_attn\..*_proj$", r"re:.*experts\..*"]
        tiles = FP8BlockDequantizer(targets=targets, weight_block_size=tuple(job["tile"]))
    model_free_ptq(job["model"], job["out"], scheme=scheme, ignore=job["ignore"], device=job["device"], converter=tiles)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
