"""docs/results.md from stored results: every format of a model beside files of the same bytes by the rules of others.

    python bench/results.py                                       # the page, from docs/results/*.json
    python bench/results.py make demo --folder out                # every file into out, in one pass
    python bench/results.py measure demo --folder out             # scores all, stores
    torchrun --nproc-per-node 8 bench/results.py measure hf:MiniMaxAI/MiniMax-M2.7 --folder m27 --context 2048

One pass scores all files on the same windows, exactly and as engines compute them; a pair's difference is that of the
paired bootstrap. The rules of others are rounded in memory, with the bytes of our file in the same format (bench/
fp4_quality.py, by_bytes.py); stock GGUF is ggml's own encoder under llama-imatrix's sums (--imatrix).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import _path
import torch
from _results_page import page
from _results_rivals import Rival

from mmquant.calibration.model.distributed import current_ranks, leave, rank_device
from mmquant.convert.files.atomic import whole_file
from mmquant.convert.gguf.imatrix import read_imatrix
from mmquant.convert.open import open_source
from mmquant.convert.source import Source
from mmquant.errors import InputError
from mmquant.runs.evaluation.claims import paired
from mmquant.runs.evaluation.run import measure, settings_of
from mmquant.runs.evaluation.text import make_eval_sample
from mmquant.runs.options_use import EvalOptions

STORED = _path.ROOT / "docs" / "results"
PAGE = _path.ROOT / "docs" / "results.md"
PROFILES = ("vllm-h100", "vllm-a100", "vllm-b200", "llama.cpp")
# Name of the folder -> the command that makes it, and the rule that others use at its bytes.
ROWS: dict[str, tuple[str, str | None]] = {
    "fp8": ("fp8", None),
    "fp8-channel": ("fp8 --scheme channel", None),
    "int4": ("int4", "to nearest, largest / 7.5"),
    "int4-attention-fp8": ("int4 --attention fp8", None),
    "int4-cache-fp8": ("int4 --kv-cache fp8", None),
    "awq": ("int4 --method awq --format awq", None),
    "nvfp4": ("nvfp4", "by the maximum"),
    "nvfp4-w4a4": ("nvfp4 --activations nvfp4", None),
    "mxfp4": ("mxfp4", "by OCP's rule"),
    "mlx": ("mlx", "mlx's own rounding"),
    "mlx-mxfp4": ("mlx --mode mxfp4", "mlx's own rounding, mxfp4"),
    "mlx-nvfp4": ("mlx --mode nvfp4", "mlx's own rounding, nvfp4"),
    "gguf-Q8_0": ("gguf --type Q8_0", "ggml's encoder, imatrix"),
    "gguf-Q6_K": ("gguf --type Q6_K", "ggml's encoder, imatrix"),
    "gguf-Q4_K_M": ("gguf --type Q4_K_M", "ggml's encoder, imatrix"),
    "gguf-IQ4_XS": ("gguf --type IQ4_XS", "ggml's encoder, imatrix"),
}


def artifact(folder: Path, name: str) -> Path:
    """The folder or file of a row. InputError where it is not finished."""
    out = folder / name
    if not (out / "mmquant.fit.json").exists():
        raise InputError(f"{out}: not finished, expected what `python bench/results.py make` writes")
    return next(iter(sorted(out.glob("*.gguf"))), out)


def recipe(model: str, rows: list[str]) -> str:
    """A recipe of rows, each by its command; the calibration text is the bundled one."""
    lines = [f"model: {model}", "corpora:", "  main: {text: [default]}", "variants:"]
    for name in rows:
        command, *words = ROWS[name][0].split()
        options = zip(words[::2], words[1::2], strict=True)
        said = "".join(f", {option.removeprefix('--').replace('-', '_')}: {value}" for option, value in options)
        lines.append(f"  {name}: {{command: {command}{said}}}")
    return "\n".join(lines) + "\n"


def make(folder: Path, rows: list[str], model: str, words: list[str]) -> None:
    """What is missing of the rows, in one pass over the model; `words`: more for mmquant run."""
    file = folder.with_name(f"{folder.name}.yaml")  # beside it: a run wants an empty folder, or one of its own
    file.write_text(recipe(model, rows))
    line = [sys.executable, "-m", "mmquant", "run", str(file), "--out", str(folder), *words]
    if code := subprocess.run(line, check=False).returncode:
        sys.exit(code)


def measure_all(a: argparse.Namespace) -> dict[str, Any] | None:
    """Score every row and its rival in one pass: what the page needs of it."""
    truth = open_source(a.model)
    imatrix = None if a.imatrix is None else read_imatrix(a.imatrix)
    names, sources = [], list[Source]()
    for name in a.rows:
        ours, rule = open_source(artifact(a.folder, name)), ROWS[name][1]
        names.append((name, "mmquant"))
        sources.append(ours)
        if rule is not None:
            names.append((name, rule))
            sources.append(Rival(ours, truth, rule, imatrix))  # type: ignore[arg-type]
    options = EvalOptions(engine_like=PROFILES, windows=a.windows, context=a.context, state=a.state, floor=a.floor)
    sample = make_eval_sample(truth, (), options)
    found = measure(truth, sources, sample, settings_of(str(rank_device(a.device)), options), options)
    if not current_ranks().first:
        return None
    rows = [short(name, by, found["candidates"][i]) for i, (name, by) in enumerate(names)]
    seed = found["sample"]["interval"]["seed"]
    pairs = []
    for i, (name, by) in enumerate(names):
        if by != "mmquant":
            pairs.append({"file": name, "by": by} | paired(found["candidates"][i - 1], found["candidates"][i], seed))
    keep = ("context", "windows", "positions", "tokens_sha256", "interval")
    sample_block = {name: found["sample"][name] for name in keep}
    machine = {"processor": platform.processor() or platform.machine(), "device": a.device, "torch": torch.__version__}
    head = {name: found[name] for name in ("generated", "generator", "dtype", "reference")}
    floors = [{"kind": f["kind"], "kld": f["kld"]["mean"], "top1": f["top1"]} for f in found["floors"]]
    head |= {"commit": _path.commit()}
    return {**head, "model": a.model, "machine": machine, "sample": sample_block, "floors": floors} | {
        "rows": rows,
        "pairs": [{k: v for k, v in pair.items() if k not in ("first", "second", "log_ppl")} for pair in pairs],
    }


def short(name: str, by: str, candidate: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a candidate that the page shows."""
    likes = [
        {"profile": like["profile"], "inputs": like["inputs"], "kld": like["kld"]["mean"], "top1": like["top1"]}
        for like in candidate["engine_like"]
    ]
    numbers = {key: candidate[key] for key in ("bytes", "bits_per_weight", "ppl", "top1")}
    kld = {"kld": candidate["kld"]["mean"], "ci95": candidate["kld"]["mean_ci95"], "p999": candidate["kld"]["p999"]}
    return {"file": name, "by": by, **numbers, **kld, "engine_like": likes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what")
    first, one = parts.add_parser("make"), parts.add_parser("measure")
    for part in (first, one):
        part.add_argument("model")
        part.add_argument("--folder", type=Path, required=True)
        part.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    first.add_argument("--dry-run", action="store_true", help="what the files need, and no file")
    one.add_argument("--name", help="of the stored result; default: the model")
    one.add_argument("--imatrix", type=Path, help="llama-imatrix's file, for stock GGUF")
    one.add_argument("--windows", type=int, default=16)
    one.add_argument("--context", type=int)
    one.add_argument("--state", type=Path)
    one.add_argument("--floor", action="store_true")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.rows, given.model, ["--dry-run"] if given.dry_run else [])
        return
    if given.what == "measure":
        try:
            found = measure_all(given)
        finally:
            leave()
        if found is None:
            return
        STORED.mkdir(exist_ok=True)
        with whole_file(STORED / f"{given.name or Path(given.model).name}.json") as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
    stored = [json.loads(path.read_text()) for path in sorted(STORED.glob("*.json"))]
    with whole_file(PAGE) as file:
        file.write((page(stored) + "\n").encode())


if __name__ == "__main__":
    main()
