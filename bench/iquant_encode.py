"""Speed and error of the vector-codebook encoders, beside ggml's where its library is installed.

python bench/iquant_encode.py [--device cuda] [--million 64] [--kinds IQ3_S,IQ2_S] [--ggml] [--passes] [--feedback 64]
Weights are Student-t (5 degrees), importance is the square of a log-normal; CPU seconds, one thread, when --device is
cpu.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import _path  # noqa: F401
import torch

from mmquant.quantize.ggml.codebook import encode as iquants
from mmquant.quantize.ggml.codebook import ldlq as iquant_feedback
from mmquant.quantize.ggml.codebook import search as iquants_search
from mmquant.quantize.ggml.codebook.layout import LAYOUTS
from mmquant.quantize.ggml.factor import factor_moments
from mmquant.quantize.ggml.types import GGMLType


def sample(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [R, n] and importance [n]."""
    generator = torch.Generator(device).manual_seed(1)
    normal = torch.randn(rows, columns, generator=generator, device=device)
    spread = torch.randn(rows, columns, 5, generator=generator, device=device).square().mean(-1).sqrt()
    importance = torch.randn(columns, generator=generator, device=device).exp().square()
    return normal / spread * 0.02, importance


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of one call after a first one: elapsed on CUDA, of the process on CPU."""
    work()
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def error(rows: torch.Tensor, data: torch.Tensor, kind: GGMLType, importance: torch.Tensor) -> float:
    """Weighted error relative to the weighted energy."""
    decoded = iquants.decode_codebook(data, kind, rows.shape[1])
    return float((importance * (rows - decoded).square()).sum() / (importance * rows.square()).sum())


def passes(kind: GGMLType, rows: torch.Tensor, device: str) -> str:
    """Time of the two searches alone, in picoseconds a weight (CUDA) or nanoseconds (CPU)."""
    layout = LAYOUTS[kind.name]
    blocks = iquants.scaled(rows.reshape(-1, 256)[: 1 << 15], torch.ones_like(rows.reshape(-1, 256)[: 1 << 15]))
    x, weight = (t.reshape(-1, layout.shared) for t in (blocks.x, blocks.weight))
    scales = x.abs().amax(1, keepdim=True) / 20 * torch.linspace(0.5, 1.5, 16, device=x.device)
    unit = 1e9 if device == "cpu" else 1e12
    scan = seconds(lambda: iquants_search.scan(x, weight, scales, layout), device) / x.numel() * unit
    choose = seconds(lambda: iquants_search.choose(x, weight, scales[:, 6:9], layout), device) / x.numel() * unit
    return f"  scan16 {scan:6.1f}  choose3 {choose:6.1f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--million", type=float, default=0)
    parser.add_argument("--kinds", default=",".join(LAYOUTS))
    parser.add_argument("--ggml", action="store_true", help="also ggml's encoder, on CPU (needs the llamacpp extra)")
    parser.add_argument("--passes", action="store_true", help="also the searches alone")
    parser.add_argument("--feedback", type=int, default=0, help="time error feedback on so many experts of 1536 x 3072")
    options = parser.parse_args()
    million = options.million or (100 if options.device == "cuda" else 0.8)
    torch.set_num_threads(1)
    rows, importance = sample(int(million * 1e6 / 3072) + 1, 3072, options.device)
    print(f"{rows.numel() / 1e6:.1f} M weights, {options.device}, torch {torch.__version__}")
    for name in options.kinds.split(","):
        kind = GGMLType[name]
        line = f"{name:8}"
        for effort in ("fast", "default", "high"):
            took = seconds(
                lambda e=effort, k=kind: iquants.encode_codebook(rows, k, importance, iquants.EFFORTS[e]),
                options.device,
            )
            data = iquants.encode_codebook(rows, kind, importance, iquants.EFFORTS[effort])
            line += f"  {effort} {rows.numel() / took / 1e6:9.2f} Mw/s err {error(rows, data, kind, importance):.5f}"
        few = rows[:8].cpu()
        same = (
            iquants.encode_codebook(few, kind, importance.cpu())
            == iquants.encode_codebook(few.to(rows.device), kind, importance).cpu()
        )
        line += f"  bytes as on CPU {same.float().mean():.4f}"
        if options.ggml:
            line += ggml(rows.cpu()[:64], kind, importance.cpu())
        if options.passes:
            line += passes(kind, rows, options.device)
        print(line, flush=True)
        if options.feedback:
            feedback(kind, options.feedback, options.device)


def feedback(kind: GGMLType, experts: int, device: str, shape: tuple[int, int] = (1536, 3072)) -> None:
    """Time and gain of block LDLQ and of descent on random experts with correlated inputs."""
    outputs, n = shape
    generator = torch.Generator(device).manual_seed(2)
    rows = torch.randn(experts, outputs, n, generator=generator, device=device) * 0.02
    mixed = torch.randn(experts, n, n // 4, generator=generator, device=device)
    mixed *= torch.rand(experts, 1, n // 4, generator=generator, device=device) ** 2
    second = mixed @ mixed.mT / (n // 4)
    second.diagonal(dim1=1, dim2=2).add_(0.3)
    del mixed
    size = torch.randn(experts, n, generator=generator, device=device).mul_(0.5).exp_()
    second *= size.unsqueeze(1) * size.unsqueeze(2)
    importance = second.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(rows).flatten(0, 1)
    before = output_error(rows, iquants.encode_codebook(rows.flatten(0, 1), kind, importance), second, kind)
    known = iquant_feedback.factor_blocks(factor_moments(second), kind)
    took = [seconds(lambda: iquant_feedback.factor_blocks(factor_moments(second), kind), device)]
    line = f"  {experts} experts {outputs} x {n}: factor {took[0]:.2f} s"
    for passes in (0, 1):
        took.append(
            seconds(lambda p=passes: iquant_feedback.encode_blocks_with_feedback(rows, kind, known, passes=p), device)
        )
        data = iquant_feedback.encode_blocks_with_feedback(rows, kind, known, passes=passes).flatten(0, 1)
        line += f"  passes {passes}: {took[-1]:.2f} s {rows.numel() / took[-1] / 1e6:.0f} Mw/s"
        line += f" error {output_error(rows, data, second, kind) / before:.4f} of plain"
    print(line, flush=True)


def output_error(rows: torch.Tensor, data: torch.Tensor, second: torch.Tensor, kind: GGMLType) -> float:
    """Sum over experts of tr(E H E^T)."""
    off = rows - iquants.decode_codebook(data.reshape(-1, data.shape[-1]), kind, rows.shape[2]).reshape(rows.shape)
    return float((torch.bmm(off, second) * off).sum(dtype=torch.float64))


def ggml(rows: torch.Tensor, kind: GGMLType, importance: torch.Tensor) -> str:
    """ggml_quantize_chunk: speed in CPU seconds and error."""
    from mmquant.runs.evaluation import llamacpp  # type: ignore[attr-defined]

    def work() -> torch.Tensor:
        return torch.from_numpy(llamacpp.quantize(int(kind), rows.numpy(), importance.numpy()))

    took = seconds(work, "cpu")
    return f"  ggml {rows.numel() / took / 1e6:6.2f} Mw/s err {error(rows, work(), kind, importance):.5f}"


if __name__ == "__main__":
    main()
