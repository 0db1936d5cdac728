"""Evaluation speed at M2.7's shapes: FP8 reference and one INT4 candidate through one layer, with floors.

    python bench/evaluate.py --device cuda --folder /dev/shm

Writes two checkpoints of one layer (random weights: 3.6 GB of FP8, 1.9 GB of INT4, embeddings of the real vocabulary)
into the folder, runs the streamed pass over 262,144 tokens, and adds up 62 layers. Files come from the page cache;
what storage at 3 GB/s would take stands beside it (reading runs ahead of computing, so the larger of the two counts).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import _path  # noqa: F401
import numpy as np
import torch
from safetensors.torch import save_file

from mmquant.calibration.evaluate.metrics import compare
from mmquant.calibration.evaluate.settings import Settings
from mmquant.calibration.evaluate.streamed import evaluate
from mmquant.calibration.model.forward import layer_forward
from mmquant.calibration.text.sample import Sample
from mmquant.convert.checkpoints import batches
from mmquant.convert.models.shapes import global_shapes, matrix_shapes, plain_shapes
from mmquant.convert.open import open_source
from mmquant.convert.source import Source, read_layer

LAYERS, STORAGE = 62, 3e9


def config(experts: int, vocab: int) -> dict[str, object]:
    """One layer of M2.7's shape."""
    return {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "hidden_size": 3072, "head_dim": 128,
        "num_attention_heads": 48, "num_key_value_heads": 8, "intermediate_size": 1536, "num_hidden_layers": 1,
        "num_local_experts": experts, "num_experts_per_tok": 8, "vocab_size": vocab, "rotary_dim": 64,
        "rope_theta": 5000000, "rms_norm_eps": 1e-6, "max_position_embeddings": 196608, "tie_word_embeddings": True,
    }  # fmt: skip


def write(folder: Path, experts: int, vocab: int, device: str, int4: bool) -> None:
    """A checkpoint with one layer: FP8 tiles, or experts packed as INT4 g128 and attention in bfloat16."""
    folder.mkdir()
    settings = config(experts, vocab)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": []}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    group = {"targets": ["re:.*experts.*"], "weights": weights, "format": "pack-quantized"}
    packed = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": packed if int4 else fp8}))
    open_shape = _Shapes(folder, settings)
    plain: dict[str, torch.Tensor] = {}
    for name, shape in (*global_shapes(open_shape.geometry).items(), *plain_shapes(open_shape.geometry, 0)):
        if name == "lm_head.weight":
            continue
        values = torch.randn(shape, device=device) * (0.02 if len(shape) > 1 else 0.1) + ("norm" in name)
        plain[name] = values.to(torch.bfloat16).cpu()
    save_file(plain, folder / "model-00001.safetensors")
    shard: dict[str, torch.Tensor] = {}
    number = 2
    for name, shape in matrix_shapes(open_shape.geometry, 0):
        shard |= matrix(name, shape, device, int4)
        if len(shard) >= 512:
            save_file(shard, folder / f"model-{number:05d}.safetensors")
            shard, number = {}, number + 1
    save_file(shard, folder / f"model-{number:05d}.safetensors")


class _Shapes:
    """The geometry of a config that has no tensors yet."""

    def __init__(self, folder: Path, settings: dict[str, object]) -> None:
        from mmquant.convert.models.minimax_m2 import Geometry

        self.geometry = Geometry.from_config(settings)


def matrix(name: str, shape: tuple[int, int], device: str, int4: bool) -> dict[str, torch.Tensor]:
    """One random matrix as stored."""
    rows, columns = shape
    if int4 and ".experts." in name:
        words = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), device=device, dtype=torch.int32)
        scales = torch.rand(rows, columns // 128, device=device) * 0.002 + 0.004
        parts = {"weight_packed": words, "weight_scale": scales.to(torch.bfloat16)}
        return {f"{name}.{k}": v.cpu() for k, v in parts.items()}
    values = torch.randn(rows, columns, device=device)
    if int4:
        return {f"{name}.weight": (values * 0.02).to(torch.bfloat16).cpu()}
    codes = (values * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.full((-(-rows // 128), -(-columns // 128)), 3e-4)
    return {f"{name}.weight": codes.cpu(), f"{name}.weight_scale_inv": scales}


def make_sample(tokens: int, context: int, vocab: int) -> Sample:
    ids = torch.randint(0, vocab, (tokens // context, context), generator=torch.Generator().manual_seed(0))
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Sample(ids, zeros, zeros, zeros, ("random",), (), "all", context)


def timed(run: Callable[[], object], device: str) -> tuple[float, object]:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def layer_bytes(source: Source) -> int:
    return sum(info.size for name, info in source.tensors.items() if ".layers." in name)  # type: ignore[attr-defined]


def forward_all(source: Source, weights: object, hidden: torch.Tensor, batch: int) -> None:
    for start in range(0, len(hidden), batch):
        hidden[start : start + batch] = layer_forward(weights, source.geometry, hidden[start : start + batch])  # type: ignore[arg-type]


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    device, dtype = arguments.device, torch.bfloat16
    sources = [open_source(folder / "fp8"), open_source(folder / "int4")]
    sample = make_sample(arguments.tokens, arguments.context, sources[0].geometry.vocab)
    batch = arguments.batch // arguments.context
    rows, total = [], 0.0
    for label, source in zip(("FP8 reference", "INT4 candidate"), sources, strict=True):
        first, weights = timed(lambda s=source: read_layer(s, 0, device, dtype), device)
        del weights
        read, weights = timed(lambda s=source: read_layer(s, 0, device, dtype), device)
        hidden = torch.randn(sample.windows, sample.context, source.geometry.hidden, device=device)
        forward_all(source, weights, hidden[: 2 * batch], batch)
        ahead, _ = timed(lambda s=source, w=weights, h=hidden: forward_all(s, w, h, batch), device)
        del weights, hidden
        size = layer_bytes(source)
        rate = f"{size / 1e9:.2f} GB, {size / read / 1e9:.1f} GB/s; first time {first:.2f} s"
        rows.append((f"{label}: read and dequantize", read, f"{rate}; floor {size / 55e9:.3f} s at 55 GB/s"))
        flops = float(2 * arguments.tokens * (8 * 3 * 3072 * 1536 + 2 * 3072 * 128 * (48 + 8)))
        flops += 2 * arguments.tokens * arguments.context * 48 * 128
        rows.append(
            (
                f"{label}: forward of {arguments.tokens} tokens",
                ahead,
                f"{flops / ahead / 1e12:.0f} TFLOP/s; floor {flops / 9.9e14:.3f} s at 990 TFLOP/s",
            )
        )
        total += read + ahead
    whole, outcome = timed(
        lambda: evaluate(sources[0], [sources[1]], sample, Settings(device, dtype, arguments.batch)), device
    )
    scores = outcome[0].scores  # type: ignore[index]
    rows.append(
        (
            "evaluate(): the pass of one layer, head and metrics",
            whole,
            f"KLD {scores.kld.mean():.4f}, {int((~scores.finite).sum())} not finite",
        )
    )
    head = whole - total
    storage = LAYERS * sum(layer_bytes(source) for source in sources) / STORAGE
    report(rows, total, head, storage)
    check(sources, device, dtype)


def report(rows: list[tuple[str, float, str]], layer: float, rest: float, storage: float) -> None:
    for name, seconds, remark in rows:
        print(f"{name:52s} {seconds:8.3f} s   {remark}")
    compute = LAYERS * layer + rest
    print(f"{'one layer, both models':52s} {layer:8.3f} s   everything else {rest:.1f} s")
    print(f"{'62 layers, from the page cache':52s} {compute:8.1f} s")
    print(f"{'62 layers, storage alone at 3 GB/s':52s} {storage:8.1f} s")
    print(f"{'62 layers, nothing overlapped':52s} {compute + storage:8.1f} s   (limit of the issue: 240 s)")


def check(sources: list[Source], device: str, dtype: torch.dtype) -> None:
    """The device's layer equals the CPU's on a few tokens, in float32."""
    torch.manual_seed(1)
    hidden = torch.randn(1, 16, sources[0].geometry.hidden)
    for source in sources:
        few = read_layer(source, 0, "cpu", torch.float32)
        wanted = layer_forward(few, source.geometry, hidden)
        found = layer_forward(read_layer(source, 0, device, dtype), source.geometry, hidden.to(device)).cpu()
        error = float((found - wanted).norm() / (wanted - hidden).norm())
        print(
            f"{source.label}: layer on {device} in {dtype} against float32 on the CPU: relative difference {error:.4f}"
        )
        assert error < 0.05, error
    logits = torch.randn(64, 2048)
    same = compare(logits.to(device), logits.to(device), torch.zeros(64, dtype=torch.int64))
    assert same.kld.max() < 1e-12, same.kld.max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: a temporary folder")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=200064)
    parser.add_argument("--readers", type=int, help="threads that read and dequantize; default: the library's")
    arguments = parser.parse_args()
    if arguments.readers:
        batches.READERS = arguments.readers
    folder = Path(tempfile.mkdtemp(prefix="mmquant-bench-", dir=arguments.folder))
    try:
        for name in ("fp8", "int4"):
            write(folder / name, arguments.experts, arguments.vocab, arguments.device, name == "int4")
        measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
