"""Peak memory of writing a GGUF file: one layer's tensor, whatever the number of layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from mmquant.calibration.gguf_layer import encode_tensors
from mmquant.calibration.gguf_pass import CalibratedRun, Calibration
from mmquant.convert.gguf_mix import find_mix
from mmquant.convert.gguf_variant import GgufVariant
from mmquant.convert.gguf_writer import GgufWriter, plan_parts
from mmquant.convert.minimax_m2 import Geometry

class Made:
    geometry = Geometry(int(sys.argv[2]), 512, 4, 2, 64, 8, 2, 1024, 256, 32, 5e6, 1e-6, 128)
    def read(self, name):
        g = self.geometry
        shapes = {"embed_tokens": (g.vocab, 512), "lm_head": (g.vocab, 512), "q_proj": (256, 512), "k_proj": (128, 512),
                  "v_proj": (128, 512), "o_proj": (512, 256), "gate.weight": (8, 512), "bias": (8,), "q_norm": (256,),
                  "k_norm": (128,)}
        return torch.randn(next((s for part, s in shapes.items() if part in name), (512,)))
    def read_experts(self, layer, projection, experts, device, dtype):
        return torch.randn(len(experts), *((512, 1024) if projection == "w2" else (1024, 512)))

source = Made()
variant = GgufVariant(find_mix("Q4_K" if sys.argv[3] == "calibrated" else "BF16"), "m", sys.argv[3] == "calibrated")
steps = variant.steps(source.geometry)
writer = GgufWriter(Path(sys.argv[1]), plan_parts("m", {}, tuple(t for s in steps for t in s)))
if sys.argv[3] == "calibrated":
    tokens = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(0))
    CalibratedRun(source, variant, writer, Calibration(tokens, {}, "random"), "cpu").write()
else:
    for step in steps:
        for name, data in encode_tensors(source, step, "cpu"):
            writer.write(name, data)
        writer.checkpoint()
writer.finish()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
LAYER = 8 * 3 * 512 * 1024 * 4  # bytes of one layer's experts in float32


def peak(folder: Path, layers: int, how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(layers), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


@pytest.mark.parametrize("how", ["plain", pytest.param("calibrated", marks=pytest.mark.slow)])
def test_peak_memory_does_not_grow_with_layers(tmp_path: Path, how: str) -> None:
    few, many = peak(tmp_path / "few", 2, how), peak(tmp_path / "many", 10 if how == "plain" else 6, how)
    assert many - few < LAYER / 2
