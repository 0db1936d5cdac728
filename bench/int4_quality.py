"""INT4 quality: each row runs one `mmquant int4` command and scores its folder against the source.

    python bench/int4_quality.py --text calibration.txt --judge evaluation.txt --judge tuning.txt [--only high,awq]

Calibration: the first 200 windows of 512 tokens. Judged: 60 windows, every position, float32 forward; also the mean of
the first `--split` windows and of the rest (two domains). CPU seconds are the command's own, all threads together.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import _path  # noqa: F401
import torch
from torch import Tensor

from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.open import open_native, open_source
from mmquant.convert.source import Source, read_globals, read_layer

BATCH = 10
METHODS = ("--method rtn", "", "--effort high", "--method awq", "--method awq --format awq")


def commands() -> Iterator[str]:
    """The arguments of every row."""
    for attention in ("int4", "bf16"):
        for group in (128, 64, 32):
            for method in METHODS:
                yield f"{method} --group-size {group} --attention {attention}".strip()


class Judge:
    """Reference log-probabilities of some windows, and the distance of another model to them."""

    def __init__(self, source: Source, tokens: Tensor, split: int, device: str) -> None:
        self.tokens, self.split, self.device = tokens, split, device
        self.reference = list(self._predictions(source))

    def _predictions(self, source: Source) -> Iterator[Tensor]:
        g, outside = source.geometry, read_globals(source, self.device)
        layers = [read_layer(source, layer, self.device) for layer in range(g.layers)]
        for part in self.tokens.split(BATCH):
            hidden = embed(outside, part)
            for weights in layers:
                hidden = layer_forward(weights, g, hidden)
            yield torch.log_softmax(final_logits(outside, g, hidden), -1)

    @torch.no_grad()
    def row(self, source: Source) -> str:
        distances, agree = [], []
        for found, wanted in zip(self._predictions(source), self.reference, strict=True):
            distances.append((wanted.exp() * (wanted - found)).sum(-1))
            agree.append((found.argmax(-1) == wanted.argmax(-1)).float())
        kld, top = torch.cat(distances), torch.cat(agree)
        text = f" {kld.mean():.4f} | {kld.flatten().quantile(0.999):.3f} | {100 * top.mean():.2f} |"
        return text + f" {kld[: self.split].mean():.4f} | {kld[self.split :].mean():.4f} |" if self.split else text


def write(arguments: str, out: Path, a: argparse.Namespace) -> float:
    """Run the command; its CPU seconds."""
    fixed = ["--model", a.model, "--out", str(out), "--device", a.device]
    calibration = ["--text", str(a.text), "--windows", str(a.windows), "--context", "512"]
    if "rtn" in arguments:
        calibration = []
    words = [sys.executable, "-m", "mmquant", "int4", *fixed, *arguments.split(), *calibration]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--text", type=Path, required=True, help="calibration text")
    arguments.add_argument("--windows", type=int, default=200)
    arguments.add_argument("--judge", type=Path, action="append", required=True, help="text to judge by; repeatable")
    arguments.add_argument("--judge-windows", type=int, default=60)
    arguments.add_argument("--split", type=int, default=0)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--only", default="", help="rows whose arguments hold one of these, separated by commas")
    arguments.add_argument("--arguments", action="append", help="a row of one's own; repeatable")
    a = arguments.parse_args()
    source = open_native(a.model)
    tokenizer = load_tokenizer(source)
    texts = [windows(file.read_text(), tokenizer, 512, a.judge_windows) for file in a.judge]
    judges = [Judge(source, tokens, a.split, a.device) for tokens in texts]
    measured = " mean KLD | 99.9 % | top-1 % |" + (" first windows | rest |" if a.split else "")
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs; judged by {', '.join(f.name for f in a.judge)}")
    print(f"| mmquant int4 ... |{measured * len(judges)} bytes | CPU seconds |")
    for line in a.arguments or commands():
        if not any(word in line for word in a.only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            taken = write(line, out, a)
            size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
            print(f"| {line} |{''.join(j.row(open_source(out)) for j in judges)} {size:,} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
