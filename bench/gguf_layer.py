"""Time and memory of error feedback for all experts of one GGUF layer, in the shipped chunks.

python bench/gguf_layer.py [--experts 256] [--kind Q4_K ...] [--passes 0 1 2]   (CUDA; random weights and moments)

Defaults are M2.7's shape. Weights are bfloat16 and the moments of all experts lie on the device, as in the pass itself.
correct: mean moments and T = W X H^-1; factor: of the moments; columns: search, sweep, packing, rounds of descent.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).parent))
import _path  # noqa: F401  # pyright: ignore[reportUnusedImport]
import torch

from mmquant.calibration.gguf import solve as gguf_solve
from mmquant.calibration.gguf.memory import plan_experts, solve_memory
from mmquant.calibration.gguf.moments import Pair, corrected
from mmquant.calibration.gguf.solve import METHODS, Method, correction_share, solve
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.quantize.ggml.codebook import ldlq as iquant_feedback
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.factor import factor_moments
from mmquant.quantize.ggml.scalar import ldlq as feedback
from mmquant.quantize.ggml.types import GGMLType

P = ParamSpec("P")
T = TypeVar("T")
KINDS = ["Q4_K", "Q2_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XXS"]
LAYERS = 62
PARTS = {
    "correct": ("moments", "corrected"),
    "factor": ("factor_moments", "unit_factor", "factor_blocks"),
    "columns": ("encode_with_feedback", "encode_blocks_with_feedback"),
}


@dataclass
class Clock:
    """Seconds by function name; the device has finished before and after each call."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        def call(*values: P.args, **named: P.kwargs) -> T:
            start = self.now()
            result = function(*values, **named)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
            return result

        return call

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """The parts of `solve` go through `timed`."""
        both = [(gguf_solve, "factor_moments"), (feedback, "unit_factor"), (feedback, "encode_with_feedback")]
        both += [(iquant_feedback, "factor_blocks"), (iquant_feedback, "encode_blocks_with_feedback")]
        places = [(gguf_solve, "corrected"), (Method, "moments"), *both]
        before = [getattr(owner, name) for owner, name in places]
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, self.timed(name, function))
        try:
            yield
        finally:
            for (owner, name), function in zip(places, before, strict=True):
                setattr(owner, name, function)

    def part(self, name: str) -> float:
        return sum(self.seconds.get(one, 0.0) for one in PARTS[name])


def pair_of(experts: int, n: int, device: str, outputs: int = 0) -> Pair:
    """Sums over 2 n rows for each expert, drawn one expert at a time; the written input is 0.98 of the reference's."""
    pair = Pair.empty(experts, n, device, outputs)
    mixing = torch.randn(n // 4, n, device=device) / (n // 4) ** 0.5  # inputs of a model are correlated
    for expert in range(experts):
        z = torch.randn(2 * n, n // 4, device=device) @ mixing + 0.3 * torch.randn(2 * n, n, device=device)
        z *= torch.rand(n, device=device).add(0.1)
        lacking = 0.02 * torch.randn(2 * n, outputs, device=device) if outputs else None
        pair.add(expert, z / 0.98, z, d=lacking)
    return pair


def loss(data: torch.Tensor, weight: torch.Tensor, pair: Pair, kind: GGMLType, method: Method) -> float:
    """tr(E H E^T) / tr(T H T^T) of the first expert, with the T and H that the solve has: corrected as far as held-out
    rows confirm, under moments with their ridge."""
    first, exact, pooled = slice(0, 1), weight[:1].float(), pair.pooled()
    own, cross = method.moments(pooled, first)
    share = correction_share(exact, exact.shape[1], pooled, first, method)
    better = corrected(exact, own, cross, factor_moments(own, method.damping), method.drift(pooled, first))
    target = exact + (1.0 if share is None else float(share)) * (better - exact)
    error = decode(data[0], kind, target.shape[2]) - target[0]
    return float(((error @ own[0]) * error).sum() / ((target[0] @ own[0]) * target[0]).sum())


def measure(
    kind: GGMLType, weight: torch.Tensor, pair: Pair, method: Method, step: int, device: str
) -> tuple[Clock, float, str]:
    """(clock with "all" in it, relative loss, line about memory) of one solve, `step` experts at a time."""
    own, cross, rows, count = (part[:2].contiguous() for part in (pair.own, pair.cross, pair.weight, pair.rows))
    small = Pair(own, cross, rows, count)
    solve(weight[:2, :64].contiguous(), kind, small, method)  # kernels are compiled
    clock, memory, held = Clock(device), "-", 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with clock.watch():
        start = clock.now()
        data, _ = solve(weight, kind, pair, method, step)
        clock.seconds["all"] = clock.now() - start
    if device == "cuda":
        memory = f"{held / 2**30:.1f} + {(torch.cuda.max_memory_allocated() - held) / 2**30:.1f}"
    return clock, loss(torch.from_numpy(data[:1]).to(device), weight, pair, kind, method), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--kind", nargs="*", default=KINDS)
    parser.add_argument("--passes", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, hidden, width = options.device, options.hidden, options.width
    shape = Geometry(LAYERS, hidden, 48, 8, 128, options.experts, 8, width, 200064, 64, 5e6, 1e-6, 196608)
    plan = plan_experts(shape, 1 << 62, solve_memory(device))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {options.experts} experts of {hidden} x {width}; seconds")
    head = ["correct", "factor", "columns", "all", f"{LAYERS} layers"]
    print(f"{'type':8} {'matrix':6} {'passes':>6} {'at once':>7} " + " ".join(f"{h:>9}" for h in head), end="")
    print("  relative loss  GiB before + peak")
    sums: dict[tuple[str, int], float] = {}
    for role, rows, n, step in (("gate+up", 2 * width, hidden, plan.step), ("down", hidden, width, plan.down)):
        weight = (torch.randn(options.experts, rows, n, device=device) * 0.02).bfloat16()
        pair = pair_of(options.experts, n, device, hidden if role == "down" else 0)
        for kind in options.kind:
            for passes in options.passes:
                method = replace(METHODS["default"], passes=passes)
                clock, lost, memory = measure(GGMLType[kind], weight, pair, method, step, device)
                seconds = [clock.part(part) for part in PARTS]
                seconds += [clock.seconds["all"], LAYERS * clock.seconds["all"]]
                row = f"{kind:8} {role:6} {passes:6} {step:7} " + " ".join(f"{s:9.2f}" for s in seconds)
                print(f"{row}  {lost:.6f}  {memory}", flush=True)
                sums[kind, passes] = sums.get((kind, passes), 0.0) + clock.seconds["all"]
        del weight, pair
    for (kind, passes), total in sums.items():
        print(f"{kind:8} passes {passes}: {total:.2f} s a layer, {LAYERS * total / 60:.1f} min for {LAYERS} layers")


if __name__ == "__main__":
    main()
