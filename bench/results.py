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
import numpy as np
import torch
from by_bytes import nearest_rule
from fp4_quality import RULES, Rule
from torch import Tensor

from mmquant.calibration.model.distributed import current_ranks, leave, rank_device
from mmquant.convert.files.atomic import whole_file
from mmquant.convert.gguf.imatrix import Imatrix, read_imatrix
from mmquant.convert.gguf.names import ATTENTION_TENSORS, EXPERT_TENSORS, OUTPUT, TOKEN_EMBD
from mmquant.convert.open import open_source
from mmquant.convert.source import Source
from mmquant.errors import InputError
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.types import GGMLType
from mmquant.runs.evaluation import llamacpp
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


def mlx_rule(mode: str, group: int, bits: int = 4) -> Rule:
    """What mlx makes of BF16 weights, as `mlx_lm.convert` asks it; nvfp4 without a scale of the whole matrix."""

    def rule(weights: Tensor) -> Tensor:
        import mlx.core as mx

        parts = mx.array(weights.flatten(0, -2).numpy()).astype(mx.bfloat16)
        stored = mx.quantize(parts, group_size=group, bits=bits, mode=mode)
        values = mx.dequantize(*stored, group_size=group, bits=bits, mode=mode).astype(mx.float32)
        return torch.from_numpy(np.array(values)).view(weights.shape)

    return rule


EXPERT_RULES: dict[str, Rule] = {
    "to nearest, largest / 7.5": nearest_rule(128),
    "by the maximum": RULES["rule: NVFP4 by the maximum"],
    "by OCP's rule": RULES["rule: MXFP4 of OCP"],
    "mlx's own rounding": mlx_rule("affine", 64),
    "mlx's own rounding, mxfp4": mlx_rule("mxfp4", 32),
    "mlx's own rounding, nvfp4": mlx_rule("nvfp4", 16),
}


class Rival:
    """The bytes of an artifact of ours with values that another rule rounded; everything else is that artifact's."""

    def __init__(self, ours: Source, truth: Source, rule: str, imatrix: Imatrix | None) -> None:
        self.ours, self.truth, self.rule, self.imatrix = ours, truth, rule, imatrix
        self.label = f"{ours.label}, {rule}"
        self.fingerprint = f"{ours.fingerprint} {rule}"
        self.is_gguf = ours.ggml_type(TOKEN_EMBD) is not None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - what is not a value is the artifact's
        return getattr(self.ours, name)

    def read(self, name: str) -> Tensor:
        """A matrix outside the experts: as ggml encodes it, or as it was."""
        kind = self.ours.ggml_type(self._gguf_name(name)) if self.is_gguf else None
        if kind is None or GGMLType[kind] in (GGMLType.F32, GGMLType.BF16):
            return self.truth.read(name) if self.is_gguf else self.ours.read(name)
        return self._encoded(self._gguf_name(name), self.truth.read(name)[None], range(1))[0]

    def _gguf_name(self, name: str) -> str:
        names = self.truth.geometry.names
        outside = {names.embed: TOKEN_EMBD, names.head: OUTPUT}
        for layer in range(self.truth.geometry.layers):
            for gguf, release in ATTENTION_TENSORS.items():
                outside[names.attention(layer, release) + ".weight"] = f"blk.{layer}.{gguf}.weight"
        return outside.get(name, name)

    def read_experts(
        self, layer: int, projection: str, experts: range, device: torch.device | str, dtype: torch.dtype
    ) -> Tensor:
        """[len(experts), out, in] by the rule; gate and up of an expert together, as engines fuse them."""
        values = self.truth.read_experts(layer, projection, experts, "cpu", torch.float32)
        if self.is_gguf:
            short = next(short for short, role in EXPERT_TENSORS.items() if role == projection)
            return self._encoded(f"blk.{layer}.{short}.weight", values, experts).to(device, dtype)
        rule = EXPERT_RULES[self.rule]
        if projection == "down":
            return rule(values).to(device, dtype)
        other = self.truth.read_experts(layer, "up" if projection == "gate" else "gate", experts, "cpu", torch.float32)
        return rule(torch.cat((values, other), 1))[:, : values.shape[1]].to(device, dtype)

    def _encoded(self, name: str, values: Tensor, experts: range) -> Tensor:
        kind = self.ours.ggml_type(name)
        assert kind is not None
        found = None if self.imatrix is None else self.imatrix.weights.get(name)
        weights = None if found is None else found.mean()
        parts = []
        for matrix, expert in zip(values, experts, strict=True):
            data = llamacpp.quantize(
                int(GGMLType[kind]), matrix.numpy(), None if weights is None else weights[expert % len(weights)]
            )
            parts.append(decode(torch.from_numpy(data), GGMLType[kind], matrix.shape[1]))
        return torch.stack(parts)


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


def page(stored: list[dict[str, Any]]) -> str:
    """docs/results.md."""
    lines = [INTRODUCTION, *(line for found in stored for line in model_section(found)), RECIPE]
    return "\n".join(lines)


def model_section(found: dict[str, Any]) -> list[str]:
    """The tables of one model."""
    sample, machine = found["sample"], found["machine"]
    title = (
        f"## {found['model']}: {sample['positions']:,} positions in {sample['windows']} windows of {sample['context']}"
    )
    made = f" of commit {found['commit']}" if found.get("commit") else ""
    facts = (
        f"{found['dtype']}, {machine['device']}, torch {machine['torch']}, {found['generated'][:10]}{made}; "
        "mean KLD in nats,"
    )
    lines = ["", title, "", f"{facts} 95 % interval by {sample['interval']['unit']}s.", ""]
    lines += ["| file | by | bytes | bits a weight | KLD exact | 95 % | 99.9 % | top-1 % | as engines compute it |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [numbers_row(row) for row in found["rows"]]
    if found["floors"]:
        floors = ", ".join(f"{f['kind'].removeprefix('floor: ')} {f['kld']:.2g}" for f in found["floors"])
        lines += ["", f"Noise floor (the original against itself, mean KLD): {floors}."]
    lines += ["", "Against the same bytes by other rules, paired on the same windows:", ""]
    lines += ["| file | other | KLD ours / theirs | difference | 95 % | p | nearer than theirs |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    by = {(row["file"], row["by"]): row["kld"] for row in found["rows"]}
    for pair in found["pairs"]:
        ratio = by[pair["file"], "mmquant"] / by[pair["file"], pair["by"]]
        lines.append(f"| {pair['file']} | {pair['by']} | {ratio:.2f} | {pair_cells(pair)} |")
    return lines


def pair_cells(pair: dict[str, Any]) -> str:
    """Difference, interval, p and what may be claimed."""
    if "kld" not in pair:
        return " |  |  | not comparable"
    low, high = pair["kld"]["ci95"]
    holds = {"better": "yes", "worse": "no: farther"}.get(pair["verdict"], "not shown")
    return f"{pair['kld']['difference']:+.4f} | {low:+.4f} .. {high:+.4f} | {pair['kld']['p']:.2g} | {holds}"


def numbers_row(row: dict[str, Any]) -> str:
    """One file."""
    groups: dict[str, list[str]] = {}  # profiles that say the same
    for like in row["engine_like"]:
        cache = "" if like["inputs"]["cache"] == "16bit" else f", {like['inputs']['cache']} cache"
        groups.setdefault(f"{like['kld']:.4f}{cache}", []).append(like["profile"])
    likes = "; ".join(f"{', '.join(names)} {value}" for value, names in groups.items())
    ci = f"{row['ci95'][0]:.4f} .. {row['ci95'][1]:.4f}" if row["ci95"] else ""
    numbers = f"{row['bytes']:,} | {row['bits_per_weight']:.2f} | {row['kld']:.4f} | {ci} | {row['p999']:.3f}"
    return f"| {row['file']} | {row['by']} | {numbers} | {100 * row['top1']:.1f} | {likes} |"


INTRODUCTION = """# Results: every format, exact and as engines compute it

`make results` writes this page from `docs/results/*.json`, which `python bench/results.py measure` stored. Nothing on
it is typed by hand but this paragraph and the recipe at its end. "KLD exact" is the distance of the stored weights; "as
engines compute it" adds what an engine rounds on the way (`mmquant eval --engine-like`, [eval.md](eval.md)). Rows by
something else than mmquant hold other people's rules at the bytes of our file in that format; stock GGUF is ggml's own
encoder under llama-imatrix's sums of the same calibration text. No number of M2.7 is here: nobody has run it yet. The
demo has 14.4 M weights; what it shows is order and sign, not the size of a loss at 229 B."""

RECIPE = """
## The same page for MiniMax-M2.7, on a node

    python bench/results.py make hf:MiniMaxAI/MiniMax-M2.7 --folder m27 --dry-run   # writes m27.yaml
    torchrun --nproc-per-node 8 -m mmquant run m27.yaml --out m27
    torchrun --nproc-per-node 8 bench/results.py measure hf:MiniMaxAI/MiniMax-M2.7 --folder m27 --name m27 \\
      --context 2048 --windows 128 --imatrix m27.imatrix.gguf
    make results

On 8 GPUs of 80 GB. The files are written in one pass over the model ([run.md](run.md)); `m27.imatrix.gguf` is
llama-imatrix's (without it ggml's encoder has no importance). Then one pass over the layers scores all. Estimates, none
of it measured; the speeds are those of [eval.md](eval.md) and of one H200 in `bench/RESULTS.md`:

| what | estimate |
| --- | --- |
| disk | 229 G weights x bits a weight / 8: FP8 230 GB, Q8_0 243, others 120 to 190; 2.4 TB for all rows |
| making | a layer of all rows on one H200: 56 s (INT4 2.3, FP4 and MLX 3.3, k-quants 8.9); 8 at 60 %: 12 minutes |
| writing | 2.4 TB at 2 GB/s: 20 minutes |
| host memory | hidden states: 262,144 tokens x 12 KB = 3.2 GB for each of about 70 models, beyond 8 GiB in files |
| GPU memory | a layer in float32 14.6 GB, twice that where an engine's weights differ, activations 16 GB |
| reading | 2.4 TB at 3 GB/s: 13 minutes, or as long as the download takes |
| layers | float32 on 8 GPUs about 1.2 s a layer and model, 70 models x 62 layers: 87 minutes |
| head and metrics | 200,064 tokens: 1.5 minutes a model on 8 GPUs, 105 minutes |

A model is a file, its rival, or one of them as an engine computes it (26 rows, 44 more by profiles).
`--rows int4 nvfp4 gguf-Q4_K_M` takes some of them; `--state DIR` goes on after a stop."""


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
