"""Time of error feedback for the experts of one layer of M2.7's shape, moments given; 62 layers extrapolated.

python bench/gguf_layer.py [--experts 256] [--kind Q4_K ...]   (CUDA; random weights and moments)
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import _path  # noqa: F401  # pyright: ignore[reportUnusedImport]
import torch

from mmquant.quantize.ggml import feedback, iquant_feedback
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.grid import FORMS
from mmquant.quantize.ggml.types import GGMLType

HIDDEN, WIDTH = 3072, 1536
CHUNK = 32  # experts solved at once


def moments_of(experts: int, n: int, device: str) -> torch.Tensor:
    x = torch.randn(experts, 2 * n, n, device=device) * torch.rand(n, device=device).add(0.1)
    return torch.bmm(x.mT, x) / (2 * n)


def run(kind: GGMLType, weight: torch.Tensor, second: torch.Tensor, passes: int) -> torch.Tensor:
    if kind in FORMS:
        return feedback.encode_with_feedback(weight, kind, feedback.factor(second), passes)
    return iquant_feedback.encode_with_feedback(weight, kind, iquant_feedback.factor(second, kind), passes=passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--kind", nargs="*", default=["Q4_K", "Q2_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = options.device

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    part = min(CHUNK, options.experts)
    inputs = {}
    for name, rows, n in (("w1+w3", 2 * WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH)):
        inputs[name] = (torch.randn(part, rows, n, device=device) * 0.02, moments_of(part, n, device))
    print(f"{part} experts measured, {options.experts} extrapolated linearly; seconds a layer")
    print(f"{'type':8} {'passes':>6} {'w1+w3':>8} {'w2':>8} {'layer':>8} {'62 layers':>10}  relative loss of w2")
    for name in options.kind:
        kind = GGMLType[name]
        for passes in (0, 2):
            seconds, data = {}, torch.empty(0)
            for role, (weight, second) in inputs.items():
                run(kind, weight[:2, :64].contiguous(), second[:2], passes)  # compile
                start = now()
                data = run(kind, weight, second, passes)
                seconds[role] = (now() - start) * options.experts / part
            weight, second = inputs["w2"]
            error = decode(data[:2].flatten(0, 1), kind, WIDTH).view(2, -1, WIDTH) - weight[:2]
            loss = ((error @ second[:2]) * error).sum() / ((weight[:2] @ second[:2]) * weight[:2]).sum()
            layer = sum(seconds.values())
            row = f"{name:8} {passes:6} {seconds['w1+w3']:8.2f} {seconds['w2']:8.2f} {layer:8.2f} {62 * layer:10.0f}"
            print(f"{row}  {float(loss):.6f}", flush=True)


if __name__ == "__main__":
    main()
