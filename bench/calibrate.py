"""Calibration speed: MoE forward of one M2.7-shaped layer with and without statistics; the demo's pass.

python bench/calibrate.py --device cuda          one layer of random FP8 weights, 262,144 tokens
python bench/calibrate.py --demo                 wall time of `mmquant calibrate --model demo` on this machine
"""

from __future__ import annotations

import argparse
import resource
import statistics as medians
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import _path  # noqa: F401
import torch

from mmquant.calibration.model import forward
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.collector_cuda import collector_for
from mmquant.convert.models.layer import LayerWeights
from mmquant.convert.models.minimax_m2 import Geometry

M27 = Geometry(
    layers=62,
    hidden=3072,
    heads=48,
    kv_heads=8,
    head_dim=128,
    experts=256,
    experts_per_token=8,
    expert_width=1536,
    vocab=200064,
    rotary_dim=64,
    rope_theta=5e6,
    norm_eps=1e-6,
    max_context=196608,
)


def random_layer(g: Geometry, device: str, dtype: torch.dtype, seed: int = 0) -> LayerWeights:
    """Random e4m3 weights with 128x128 scales, dequantized as a checkpoint's are."""
    from mmquant.quantize.fp8 import dequantize_tiles

    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        codes = torch.randn(rows, columns, generator=generator, device=device).mul_(64).clamp_(-448, 448)
        scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator, device=device) * 1e-4 + 2e-4
        return dequantize_tiles(codes.to(torch.float8_e4m3fn), scale).to(dtype)

    def experts(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(g.experts, rows, columns, dtype=dtype, device=device)
        for expert in range(g.experts):
            out[expert] = matrix(rows, columns)
        return out

    ones = torch.ones(g.hidden, device=device)
    query, key = g.heads * g.head_dim, g.kv_heads * g.head_dim
    return LayerWeights(
        input_norm=ones,
        post_norm=ones,
        q_norm=torch.ones(query, device=device),
        k_norm=torch.ones(key, device=device),
        q=matrix(query, g.hidden),
        k=matrix(key, g.hidden),
        v=matrix(key, g.hidden),
        o=matrix(g.hidden, query),
        router=torch.randn(g.experts, g.hidden, generator=generator, device=device) * 0.02,
        router_bias=torch.zeros(g.experts, device=device),
        gate=experts(g.expert_width, g.hidden),
        up=experts(g.expert_width, g.hidden),
        down=experts(g.hidden, g.expert_width),
    )


def timed(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median seconds after one warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return medians.median(seconds[1:])


def check(weights: LayerWeights, g: Geometry, hidden: torch.Tensor) -> None:
    """The collector's moments of some experts against float64 products of the rows it was shown."""

    class Rows(forward.Observer):
        def __init__(self) -> None:
            self.x: dict[int, torch.Tensor] = {}
            self.h: dict[int, torch.Tensor] = {}

        def moe_input(self, x: torch.Tensor, routing: forward.Routing) -> None:
            self.weights = routing.weights

        def experts(self, x, h, y, token, slot, offsets) -> None:
            for e in (0, g.experts // 3, g.experts - 1):
                part = slice(offsets[e], offsets[e + 1])
                share = self.weights[token[part], slot[part]].double()[:, None]
                self.x[e], self.h[e] = x[part].double() * share, h[part].double() * share

    collector, rows = collector_for(weights, Collect())(0, weights, g, Collect(), 1), Rows()
    collector.begin(0, hidden.shape[1], torch.zeros(hidden.shape[0], dtype=torch.long))
    forward.moe(weights, g, hidden, collector)
    forward.moe(weights, g, hidden, rows)
    found = collector.statistics()
    for name, moments, seen in (("gate/up", found.expert_in, rows.x), ("down", found.expert_mid, rows.h)):
        assert moments.second is not None
        for e, values in seen.items():
            true = values.T @ values
            error = float((moments.second[e] - true).norm() / true.norm())
            print(f"  second moment of {name} input, expert {e}: {len(values)} rows, relative error {error:.1e}")
            assert error < 5e-3


def layer_speed(device: str, tokens: int, context: int, rows: list[int], profile: bool) -> None:
    g, dtype = M27, torch.bfloat16
    weights = random_layer(g, device, dtype)
    hidden = torch.randn(tokens // context, context, g.hidden, device=device)
    check(weights, g, hidden[:4])
    observer = forward.Observer()
    domains = torch.zeros(len(hidden), dtype=torch.long)

    def with_statistics(collect: Collect) -> None:
        collector = collector_for(weights, collect)(0, weights, g, collect, 1)
        collector.begin(0, context, domains)
        forward.moe(weights, g, hidden, collector)
        collector.statistics()

    print(f"{torch.cuda.get_device_name() if device.startswith('cuda') else 'CPU'}, torch {torch.__version__}")
    print("| routed rows at once | forward alone s | with diagonals s | with full moments s | ratio | M tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in rows:
        forward.rows_at_once = lambda device, count=count: count
        alone = timed(lambda: forward.moe(weights, g, hidden, observer), device)
        diagonal = timed(lambda: with_statistics(Collect(full=False)), device)
        full = timed(lambda: with_statistics(Collect()), device)
        speed = tokens / full / 1e6
        print(f"| {count} | {alone:.3f} | {diagonal:.3f} | {full:.3f} | {full / alone:.2f} | {speed:.2f} |", flush=True)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watch:
            with_statistics(Collect())
            torch.cuda.synchronize()
        print(watch.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=50))


def demo_speed() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "mmquant", "calibrate", "--model", "demo", "--out", f"{folder}/statistics"]
        subprocess.run(command, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime
        print(f"demo, default calibration: {time.perf_counter() - start:.1f} s, {cpu:.1f} CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rows", type=int, nargs="+", default=[forward.ROWS << 3])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    if args.demo:
        demo_speed()
    else:
        layer_speed(args.device, args.tokens, args.context, args.rows, args.profile)


if __name__ == "__main__":
    main()
