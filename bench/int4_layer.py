"""GPTQ of one real-size layer with given moments: 256 experts, gate+up [3072, 3072] and down [3072, 1536].

    python bench/int4_layer.py [--experts 256] [--chunk 128] [--group 128] [--tune]

Prints seconds and parts beside their floors, the guard's (calibration/folder/guard.py), the allocator's peak, and
checks the codes against the CPU's.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import _path  # noqa: F401
import torch
from torch import Tensor

from mmquant.calibration.folder.guard import guarded
from mmquant.calibration.folder.options import FLOOR, SAMPLING
from mmquant.calibration.statistics.held import HELD
from mmquant.quantize.integer import gptq, gptq_triton
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.quantize.integer.grid import dequantize, search_weights
from mmquant.quantize.integer.panel import Panel, Solved
from mmquant.quantize.linear_algebra import permute_both

FP32 = 60e12  # float32 multiply-adds counted as two operations, H200 without TF32
TILING = ("SEARCH_TILE", "SEARCH_WARPS", "SWEEP_TILE", "SWEEP_WARPS")


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(count: int, n: int) -> Tensor:
    """Inputs [R, n] with a decaying, correlated spectrum."""
    x = torch.randn(count, n, device="cuda") * torch.linspace(0.3, 2.0, n, device="cuda")
    x[:, 1:] += 0.5 * x[:, :-1]
    return x


def moments(experts: int, n: int) -> Tensor:
    """Mean second moments of such inputs [E, n, n], with the ridge that calibration gives them at so many rows."""
    second = torch.empty(experts, n, n, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    for e in range(experts):
        x = rows(n + 256, n)
        torch.mm(x.mT, x, out=second[e])
    torch.backends.cuda.matmul.allow_tf32 = False
    second = second.add_(second.mT.clone()).div_(2 * (n + 256))
    diagonal = second.diagonal(dim1=1, dim2=2)
    diagonal.add_(min(1.0, FLOOR + SAMPLING * n / (n + 256)) * diagonal.mean(1, keepdim=True))
    return second


def solve(weight: Tensor, second: Tensor, group: int, chunk: int) -> list[Solved]:
    """The layer's experts, `chunk` at a time."""
    parts = range(0, weight.shape[0], chunk)
    return [gptq.gptq_quantize(weight[s : s + chunk], second[s : s + chunk], GptqGrid(4, group)) for s in parts]


def guard(weight: Tensor, second: Tensor, a: argparse.Namespace) -> None:
    """Seconds of the comparison with a plain search, for held-out rows of the moments' kind and for rows of noise."""
    experts, outputs, n = weight.shape
    grid, diagonal = GptqGrid(4, a.group), second.diagonal(dim1=-2, dim2=-1)
    for kind in ("as the moments", "noise"):
        held = torch.stack([rows(HELD, n) if kind != "noise" else torch.randn(HELD, n, device="cuda") for _ in weight])
        taken, plain = 0.0, 0
        for start in range(0, experts, a.chunk):
            part = slice(start, start + a.chunk)
            solved = gptq.gptq_quantize(weight[part], second[part], grid)
            seen, found = (diagonal[part], held[part]), []

            def work(part: slice = part, solved: Solved = solved, seen: tuple[Tensor, Tensor] = seen) -> None:
                found.append(guarded(weight[part], solved, grid, seen, 2 if outputs == n else 1))  # noqa: B023

            taken += seconds(work)
            plain += int(found[0].plain.any(1).sum())
        print(f"  guard, held rows {kind}: {taken:.3f} s, {plain} of {experts} experts rounded plainly after all")


def parts_of(weight: Tensor, second: Tensor, group: int) -> dict[str, float]:
    """Seconds of a solve's parts, each run alone."""
    experts, outputs, n = weight.shape
    found: dict[str, float] = {}
    order = gptq.processing_order(second.diagonal(dim1=-2, dim2=-1), group)
    found["permute moments"] = seconds(lambda: permute_both(second, order))
    found["factor (with it)"] = seconds(lambda: gptq.gptq_factor(second, group))
    columns = gptq.permute_columns(weight, order).mT.contiguous()
    found["permute weights"] = seconds(lambda: gptq.permute_columns(weight, order).mT.contiguous())
    part, importance = columns[:, :group].clone(), torch.rand(experts, group, device="cuda")
    steps = n // group
    found["scale search"] = steps * seconds(lambda: gptq_triton.search_group(part, search_weights(importance), 4))
    scale = gptq_triton.search_group(part, search_weights(importance), 4)
    codes, errors = torch.empty(part.shape, dtype=torch.int8, device="cuda"), torch.empty_like(part)
    triangle = torch.eye(group, device="cuda").repeat(experts, 1, 1)

    def inside() -> None:
        gptq_triton.sweep_block(Panel(part, part.clone(), triangle, scale, scale, codes, errors), (scale, None), 4)

    found["columns in blocks"] = steps * seconds(inside)
    lower = second

    def products() -> None:
        for start, stop in gptq.blocks(n, group):
            if stop < n:
                view = columns[:, start:stop]
                torch.baddbmm(view, lower[:, stop:, start:stop].mT, columns[:, stop:], out=view)

    found["error products"] = seconds(products)
    found["floor of products"] = experts * outputs * n * n / FP32
    found["floor of factor"] = experts * n**3 / 3 / FP32
    return found


def tune(experts: int, group: int) -> None:
    """Tiles and warps of both kernels."""
    part = torch.randn(experts, group, 3072, device="cuda")
    importance = search_weights(torch.rand(experts, group, device="cuda"))
    scale = gptq_triton.search_group(part, importance, 4)
    codes, errors = torch.empty(part.shape, dtype=torch.int8, device="cuda"), torch.empty_like(part)
    triangle = torch.eye(group, device="cuda").repeat(experts, 1, 1)
    panel = Panel(part, part.clone(), triangle, importance, importance, codes, errors)
    usual = [getattr(gptq_triton, name) for name in TILING]
    for tile, warps in itertools.product((16, 32, 64, 128), (1, 2, 4, 8)):
        for name, value in zip(TILING, (tile, warps, tile, warps), strict=True):
            setattr(gptq_triton, name, value)
        times = []
        for work in (
            lambda: gptq_triton.search_group(part, importance, 4),
            lambda: gptq_triton.sweep_block(panel, (scale, None), 4),
        ):
            work()
            times.append(seconds(work))
        print(f"  tile {tile:3d} warps {warps}: search {1e3 * times[0]:7.2f} ms, sweep {1e3 * times[1]:7.2f} ms")
    for name, value in zip(TILING, usual, strict=True):
        setattr(gptq_triton, name, value)


def check(group: int) -> None:
    """A small case on both paths: share of codes that differ, and the losses."""
    n = 256 if group == 32 else 512
    x = torch.randn(3, 1500, n) @ torch.randn(n, n) / 22
    second, weight = x.mT @ x / 1500, torch.randn(3, 100, n)
    cpu = gptq.gptq_quantize(weight, second, GptqGrid(4, group)).weight
    gpu = gptq.gptq_quantize(weight.cuda(), second.cuda(), GptqGrid(4, group)).weight
    losses = []
    for result in (cpu, gpu):
        error = weight - dequantize(result).cpu()
        losses.append(float(((error @ second) * error).sum()))
    turned = float((cpu.codes != gpu.codes.cpu()).float().mean())
    print(f"check g{group}: {turned:.4%} of the codes differ from the CPU's, loss {losses[1] / losses[0]:.6f} of its")


def measure(name: str, outputs: int, n: int, a: argparse.Namespace) -> None:
    """One kind of matrix: seconds for all experts, working memory, parts."""
    second, weight = moments(a.experts, n), torch.randn(a.experts, outputs, n, device="cuda")
    solve(weight[: a.chunk], second[: a.chunk], a.group, a.chunk)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = seconds(lambda: solve(weight, second, a.group, a.chunk))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    shape = f"{a.experts} experts [{outputs}, {n}] g{a.group}"
    print(f"{name}: {shape}: {taken:.3f} s, {peak:.1f} GB beside weights and moments")
    guard(weight, second, a)
    if a.group == 128:
        share = a.experts / a.chunk
        for part, value in parts_of(weight[: a.chunk], second[: a.chunk], a.group).items():
            print(f"  {part:20s} {share * value:.3f} s")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--experts", type=int, default=256)
    arguments.add_argument("--chunk", type=int, default=128)
    arguments.add_argument("--group", type=int, default=128)
    arguments.add_argument("--tune", action="store_true")
    a = arguments.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for group in (32, 128, -1):
        check(group)
    if a.tune:
        tune(32, a.group)
    for name, outputs, n in (("gate+up", 3072, 3072), ("down", 3072, 1536)):
        measure(name, outputs, n, a)


if __name__ == "__main__":
    main()
