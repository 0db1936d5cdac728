"""GPTQ of one real-size layer on FP4 grids beside INT4: 256 experts, gate+up [3072, 3072] and down [3072, 1536].

    python bench/fp4_layer.py [--experts 256] [--chunk 128] [--tune]

Seconds of the solve as `int4`, `nvfp4` and `mxfp4` run it (error feedback, then refit or descent), by part, and the
codes beside the CPU's in a small case.
"""

from __future__ import annotations

import argparse
import itertools

import _path  # noqa: F401
import torch
from int4_layer import moments, seconds
from torch import Tensor

from mmquant.quantize.fp4 import panel_triton
from mmquant.quantize.fp4.grid import MXFP4, NVFP4
from mmquant.quantize.integer.gptq import gptq_factor, gptq_quantize
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import IntWeight, dequantize
from mmquant.quantize.integer.panel import Grid, Solved

GRIDS: dict[str, Grid] = {"int4 g128": GptqGrid(4, 128), "int4 g32": GptqGrid(4, 32), "nvfp4": NVFP4, "mxfp4": MXFP4}


def loss(weight: Tensor, found: IntWeight, second: Tensor) -> float:
    error = weight - dequantize(found)
    return float(((error @ second) * error).sum())


def check(name: str, grid: Grid) -> None:
    """A small case on both devices: share of codes that differ, and the losses."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1500, 384, generator=generator) @ torch.randn(384, 384, generator=generator) / 20
    second, weight = x.mT @ x / 1500, torch.randn(3, 100, 384, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        w, h = weight.to(device), second.to(device)
        solved = gptq_quantize(w, h, grid)
        refitted = grid.refit(w, solved, h)
        found.append((solved.weight.codes.cpu(), loss(w, solved.weight, h), loss(w, refitted.weight, h)))
    (codes, first, last), (other, first2, last2) = found
    turned = float((codes != other).float().mean())
    print(f"check {name}: {turned:.3%} of the codes differ from the CPU's, loss {first2 / first:.5f} of its, ", end="")
    print(f"refitted {last2 / last:.5f}; refit {last2 / first2:.3f} of feedback alone")


def measure(name: str, grid: Grid, weight: Tensor, second: Tensor, chunk: int) -> tuple[float, float]:
    """Seconds of error feedback and of refit or descent for all experts."""
    parts = [slice(s, s + chunk) for s in range(0, len(weight), chunk)]
    grid.refit(weight[:2], gptq_quantize(weight[:2], second[:2], grid), second[:2])  # compiled
    feedback = refit = 0.0
    for part in parts:
        w, h = weight[part], second[part]
        found: list[Solved] = []
        feedback += seconds(lambda w=w, h=h, found=found: found.append(gptq_quantize(w, h, grid)))
        refit += seconds(lambda w=w, h=h, found=found: grid.refit(w, found[0], h))
    factor = sum(seconds(lambda part=part: gptq_factor(second[part], max(1, grid.group_size))) for part in parts)
    print(f"  {name:10s} feedback {feedback:.3f} s (factor {factor:.3f}), refit {refit:.3f} s")
    return feedback, refit


def tune(weight: Tensor, second: Tensor) -> None:
    """Tiles and warps of the group kernel; panels of the descent."""
    for grid, tile, warps in itertools.product((NVFP4, MXFP4), (32, 64, 128), (1, 2, 4)):
        panel_triton.TILE, panel_triton.WARPS = tile, warps
        gptq_quantize(weight[:2], second[:2], grid)
        taken = seconds(lambda grid=grid: gptq_quantize(weight, second, grid))
        print(f"  group {grid.group_size} tile {tile:3d} warps {warps}: {taken:.3f} s")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--experts", type=int, default=256)
    arguments.add_argument("--chunk", type=int, default=128)
    arguments.add_argument("--tune", action="store_true")
    a = arguments.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, grid in GRIDS.items():
        check(name, grid)
    totals = dict.fromkeys(GRIDS, 0.0)
    for kind, outputs, n in (("gate+up", 3072, 3072), ("down", 3072, 1536)):
        second, weight = moments(a.experts, n), torch.randn(a.experts, outputs, n, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        print(f"{kind}: {a.experts} experts [{outputs}, {n}], {a.chunk} at a time")
        if a.tune:
            tune(weight[:32], second[:32])
            panel_triton.TILE, panel_triton.WARPS = 64, 1
        for name, grid in GRIDS.items():
            totals[name] += sum(measure(name, grid, weight, second, a.chunk))
        print(f"  {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most")
        del second, weight
    for name, total in totals.items():
        print(f"{name:10s} {total:.3f} s a layer, {total / totals['int4 g128']:.2f} of int4 g128")


if __name__ == "__main__":
    main()
