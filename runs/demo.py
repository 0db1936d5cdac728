"""Run the whole pipeline on the bundled model: every variant, one evaluation, manifests, a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmquant.monitor import current
from mmquant.tables import Size, percent
from mmquant.tables import table as aligned

from ..convert import manifest
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.atomic import write_whole
from ..convert.folder.fp8 import Fp8Variant
from ..convert.folder.weights import WeightsVariant
from ..convert.gguf.mixes import find_mix
from ..convert.gguf.variant import GgufVariant
from ..convert.open import DEMO, open_native
from .bf16 import dequantize_bf16
from .evaluation.run import record, run
from .folder import write_folder
from .fp4 import quantize_mxfp4, quantize_nvfp4
from .gguf import quantize_gguf
from .gguf_job import write_gguf
from .int4 import quantize_int4
from .mlx import quantize_mlx
from .native import write_native
from .options import GgufOptions, Int4Options, MlxOptions, Mxfp4Options, Nvfp4Options
from .options_use import EvalOptions

WINDOWS = 16
CALIBRATION = 64  # windows of calibrated variants
GGUF_TYPES = ("BF16", "Q8_0", "Q6_K", "Q4_K_M")


def variants(device: str) -> dict[str, Callable[[Checkpoint, Path], Path]]:
    """Folder name -> how to write it; each returns the path that an engine (and the check) is given."""
    table: dict[str, Callable[[Checkpoint, Path], Path]] = {
        "fp8-native": write_native,
        "fp8-block": lambda source, out: write_folder(source, Fp8Variant("block"), out, device=device),
        "fp8-channel": lambda source, out: write_folder(source, Fp8Variant("channel"), out, device=device),
        "bf16": lambda source, out: dequantize_bf16(source, out, device=device).path,
        "int4-rtn-g128": lambda source, out: write_folder(source, WeightsVariant(128), out, device=device),
        "int4-rtn-g32": lambda source, out: write_folder(source, WeightsVariant(32), out, device=device),
    }
    int4 = Int4Options(windows=CALIBRATION)
    nvfp4, mxfp4 = Nvfp4Options(windows=CALIBRATION), Mxfp4Options(windows=CALIBRATION)
    mlx = MlxOptions(bits=3, windows=CALIBRATION)
    table |= {
        "int4-gptq-g128": lambda source, out: quantize_int4(source, out, int4, device=device).path,
        "nvfp4-gptq": lambda source, out: quantize_nvfp4(source, out, nvfp4, device=device).path,
        "mxfp4-gptq": lambda source, out: quantize_mxfp4(source, out, mxfp4, device=device).path,
        "mlx-gptq-3bit": lambda source, out: quantize_mlx(source, out, mlx, device=device).path,
    }
    for kind in GGUF_TYPES:
        variant = GgufVariant(find_mix(kind), f"demo-{kind}", False)
        table[f"gguf-{kind}"] = lambda source, out, v=variant: write_gguf(source, v, out, device=device)
    gguf = GgufOptions(windows=CALIBRATION)
    table["gguf-Q4_K_M-calibrated"] = lambda source, out: quantize_gguf(source, out, gguf, device=device).path
    return table


def run_demo(out: Path, device: str = "cpu", windows: int = WINDOWS) -> list[dict[str, Any]]:
    """Write all variants under `out`, score them, write report.html and summary.json; returns the table's rows.

    A second run writes nothing anew and scores again. Without matplotlib the report has no plots.
    """
    from .reports.evaluation import write_report

    source = open_native(DEMO)
    artifacts: dict[str, Path] = {}
    for name, write in variants(device).items():
        current().message(f"writing {name}")
        artifacts[name] = write(source, out / name)
    current().message(f"checking {len(artifacts)} variants against the reference")
    paths = tuple(str(path) for path in artifacts.values())
    result = run(paths, DEMO, EvalOptions(windows=windows), device=device)
    assert result is not None
    record(paths, result)
    write_report(out / "report.html", result)
    scores = dict(zip(artifacts, result["candidates"], strict=True))
    rows = [_row(name, out / name, scores[name]) for name in artifacts]
    write_whole(out / "summary.json", (json.dumps({"rows": rows, "eval": result}, indent=1) + "\n").encode())
    return rows


def _row(name: str, folder: Path, score: dict[str, Any]) -> dict[str, Any]:
    found = manifest.read(folder)
    assert found is not None
    fits = [target["id"] for target in found["targets"] if target["fits"] != "no"]
    return {
        "variant": name,
        "bytes": score["bytes"],
        "bits_per_weight": score["bits_per_weight"],
        "ppl": score["ppl"],
        "kld": score["kld"]["mean"],
        "top1": score["top1"],
        "nonfinite": score["nonfinite"],
        "fits": fits,
        "targets": len(found["targets"]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people; `machines`: fit targets whose verdict is not no."""
    head = ("variant", "GB", "bits/w", "PPL", "KLD", "top-1 %", "machines")
    cells = [
        (
            r["variant"],
            Size(r["bytes"]),
            f"{r['bits_per_weight']:.2f}",
            f"{r['ppl']:.4f}",
            f"{r['kld']:.6f}",
            percent(r["top1"]),
            f"{len(r['fits'])} of {r['targets']}",
        )
        for r in rows
    ]
    return "\n".join(aligned(head, cells, text=("variant",)))
