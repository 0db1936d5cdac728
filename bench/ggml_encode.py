"""Error and speed of the ggml encoders beside ggml's own. Prints tables in Markdown.

python bench/ggml_encode.py --errors             error ratios on three kinds of rows (needs the llamacpp extra)
python bench/ggml_encode.py --cpu                Mweights/s of one thread (needs the llamacpp extra)
python bench/ggml_encode.py --cuda               Gweights/s of one GPU, M2.7's shapes, importance per expert
python bench/ggml_encode.py --cuda --threads 16  the same beside ggml on that many cores of the same machine
--kinds Q4_K,IQ2_S  these types only (otherwise all; --cuda: those with a reconstruction grid)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import _path  # noqa: F401
import torch
from torch import Tensor

from mmquant.quantize.ggml import codec
from mmquant.quantize.ggml.codebook.layout import LAYOUTS
from mmquant.quantize.ggml.scalar.grid import FORMS
from mmquant.quantize.ggml.types import GGMLType
from mmquant.runs.evaluation import llamacpp  # type: ignore[attr-defined]

IQUANTS = [GGMLType[name] for name in LAYOUTS]
NEEDS_IMPORTANCE = (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S)  # ggml refuses them without
EFFORTS = ("fast", "default", "high")
WHOLE_MODEL = 228.69e9  # weights of M2.7


def importance_of(columns: int) -> Tensor:
    """Log-normal with a standard deviation of 1.5: more uneven than measured ones (0.4 to 0.8)."""
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(2)))


def samples() -> dict[str, Tensor]:
    """Rows of three kinds, float32."""
    from mmquant.convert.open import open_source

    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(96, 1536, generator=generator) * 0.02
    four = torch.randn(96, 1536, 4, generator=generator)
    heavy = 0.02 * four[..., 0] / (four[..., 1:] ** 2).mean(-1).sqrt()
    source = open_source("demo")
    names = source.geometry.names
    parts = [
        source.read(names.expert(i, i, projection) + ".weight") for i in (0, 1, 3) for projection in ("gate", "up")
    ]
    return {"Gaussian": gaussian, "Student t, 3": heavy, "demo gate, up": torch.cat(parts).contiguous()}


def theirs(kind: GGMLType, rows: Tensor, importance: Tensor | None) -> Tensor:
    """ggml_quantize_chunk's bytes."""
    if importance is None and kind in NEEDS_IMPORTANCE:
        importance = torch.ones(rows.shape[1])
    imatrix = None if importance is None else importance.numpy()
    return torch.from_numpy(llamacpp.quantize(int(kind), rows.numpy(), imatrix))


def error(kind: GGMLType, rows: Tensor, data: Tensor, importance: Tensor | None, ggml_metric: bool = False) -> float:
    """sum importance * (x - q)^2; with `ggml_metric` the weight is importance * sqrt(mean x^2 + x^2), as in ggml."""
    squared = (rows - codec.decode(data, kind, rows.shape[1])).double() ** 2
    if importance is not None:
        squared = squared * importance
    if ggml_metric:
        blocks = rows.view(len(rows), -1, kind.block_columns)
        squared = squared * ((blocks**2).mean(-1, keepdim=True) + blocks**2).sqrt().view(rows.shape)
    return float(squared.sum())


def errors(kinds: list[GGMLType]) -> None:
    """The table of error ratios."""
    data = samples()
    names = [f"{name}, {w}" for name in data for w in ("plain", "weighted")]
    print("| type | " + " | ".join(names) + " | weighted, ggml's metric | fast | high |")
    print("| --- |" + " --- |" * (len(names) + 3))
    for kind in kinds:
        cells: list[str] = []
        sums: dict[str, list[float]] = {"metric": [], "fast": [], "high": []}
        for rows in data.values():
            for importance in (None, importance_of(rows.shape[1])):
                reference = theirs(kind, rows, importance)
                base = error(kind, rows, reference, importance)
                ours = {e: codec.encode(rows, kind, importance, e) for e in EFFORTS}
                cells.append(f"{error(kind, rows, ours['default'], importance) / base:.3f}")
                for name in ("fast", "high"):
                    sums[name].append(error(kind, rows, ours[name], importance) / base)
                if importance is not None:
                    base = error(kind, rows, reference, importance, True)
                    sums["metric"].append(error(kind, rows, ours["default"], importance, True) / base)
        means = " | ".join(f"{sum(v) / len(v):.3f}" for v in sums.values())
        print(f"| {kind.name} | {' | '.join(cells)} | {means} |", flush=True)


def cpu_seconds(calls: list[Callable[[], object]], rounds: int = 12) -> list[float]:
    """The least processor time of each call. They take turns: a machine that is busy for a while slows all alike."""
    best = [float("inf")] * len(calls)
    for turn in range(rounds + 1):  # the first one is not counted
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - start if turn else float("inf"))
    return best


def cpu(kinds: list[GGMLType]) -> None:
    """The table of one-thread speeds."""
    torch.set_num_threads(1)
    weights = torch.randn(512, 1536, generator=torch.Generator().manual_seed(0)) * 0.02
    importance = importance_of(1536)
    print("| type | first call, s | ggml plain | ggml weighted | fast plain | plain | fast | default | high | decode |")
    print("| --- |" + " --- |" * 9)
    for kind in kinds:
        rows = weights if kind in FORMS else weights[:64]
        start = time.process_time()
        data = codec.encode(rows[:2], kind)
        first = time.process_time() - start
        calls: list[Callable[[], object]] = [
            lambda k=kind, r=rows: theirs(k, r, None),
            lambda k=kind, r=rows: theirs(k, r, importance),
        ]
        calls += [lambda k=kind, r=rows, e=e: codec.encode(r, k, None, e) for e in EFFORTS[:2]]
        calls += [lambda k=kind, r=rows, e=e: codec.encode(r, k, importance, e) for e in EFFORTS]
        data = codec.encode(rows, kind)
        calls.append(lambda k=kind, d=data: codec.decode(d, k, 1536))
        speeds = " | ".join(f"{rows.numel() / seconds / 1e6:.1f}" for seconds in cpu_seconds(calls))
        print(f"| {kind.name} | {first:.1f} | {speeds} |", flush=True)


def cuda_seconds(call: Callable[[], object]) -> float:
    """Wall time of one call after a first one."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def cuda(kinds: list[GGMLType], threads: int) -> None:
    """The table of GPU speeds; columns and rows of gate of a quarter of a layer's experts, importance per expert."""
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    experts, columns = 64, 3072
    rows = torch.randn(experts * 1536, columns, device="cuda") * 0.02
    importance = torch.exp(torch.randn(experts, columns, device="cuda"))
    head = " | ggml, all cores" if threads else ""
    print(f"| type | first call, s | fast | default | high | whole model, s | decode | CPU error, % {head} |")
    print("| --- |" + " --- |" * (8 if threads else 7))
    for kind in kinds:
        start = time.perf_counter()
        data = codec.encode(rows[:64], kind, importance)
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        seconds = {e: cuda_seconds(lambda k=kind, e=e: codec.encode(rows, k, importance, e)) for e in EFFORTS}
        whole_data = codec.encode(rows, kind, importance)
        back = cuda_seconds(lambda k=kind, d=whole_data: codec.decode(d, k, columns))
        some, known = rows[:64].cpu(), importance.cpu()
        here = error(kind, some, codec.encode(some, kind, known), known)
        difference = 100 * (error(kind, some, data.cpu(), known) / here - 1)
        speeds = " | ".join(f"{rows.numel() / s / 1e9:.1f}" for s in seconds.values())
        whole = WHOLE_MODEL / rows.numel() * seconds["default"]
        cells = f"{first:.1f} | {speeds} | {whole:.1f} | {rows.numel() / back / 1e9:.0f} | {difference:+.3f}"
        peer = f" {ggml_cores(kind, columns, threads):.3f} |" if threads else ""
        print(f"| {kind.name} | {cells} |{peer}", flush=True)


def ggml_cores(kind: GGMLType, columns: int, threads: int) -> float:
    """Gweights/s of ggml_quantize_chunk with importance on `threads` threads."""
    rows, importance = torch.randn(64, columns) * 0.02, importance_of(columns)
    theirs(kind, rows[:1], importance)
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: theirs(kind, rows, importance), range(threads)))
    return threads * rows.numel() / (time.perf_counter() - start) / 1e9


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("errors", "cpu", "cuda"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kinds")
    chosen = parser.parse_args()
    kinds = [GGMLType[name] for name in chosen.kinds.split(",")] if chosen.kinds else [*FORMS, *IQUANTS]
    if chosen.errors:
        errors(kinds)
    if chosen.cpu:
        cpu(kinds)
    if chosen.cuda:
        cuda(kinds if chosen.kinds else list(FORMS), chosen.threads)


if __name__ == "__main__":
    main()
