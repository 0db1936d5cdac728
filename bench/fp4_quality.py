"""NVFP4 and MXFP4 quality: the rules that others use, and each `mmquant` command, scored against the source.

    python bench/fp4_quality.py --text calibration.txt --judge evaluation.txt [--only nvfp4] [--rules]

Experts only unless the arguments say otherwise. Rules, written out here: the maximum (block scale max / 6 in E4M3, the
matrix's scale max / 2688, gate and up sharing it), Four-over-Six (of max / 6 and max / 4 the one with the smaller
square error), OCP's exponent for MXFP4. Otherwise as int4_quality.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import _path  # noqa: F401
import torch
from int4_quality import BATCH, Judge
from torch import Tensor

from mmquant.calibration.model.forward import embed, final_logits, layer_forward
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.formats import mxfp4
from mmquant.convert.formats.format import Scheme
from mmquant.convert.open import open_native, open_source
from mmquant.convert.source import Source, read_globals, read_layer
from mmquant.quantize.fp4.levels import nearest

COMMANDS = (
    "nvfp4 --method rtn", "nvfp4 --effort fast", "nvfp4", "nvfp4 --effort high", "nvfp4 --attention nvfp4",
    "mxfp4 --method rtn", "mxfp4 --effort fast", "mxfp4", "mxfp4 --effort high",
)  # fmt: skip
Rule = Callable[[Tensor], Tensor]  # a stack [E, O, I] -> what it reads back as


def nvfp4_rule(weights: Tensor, ratios: tuple[float, ...]) -> Tensor:
    """Block scales max / ratio in E4M3 under the matrix's max / 2688; of several ratios the best for each block."""
    blocks = weights.unflatten(-1, (-1, 16))
    unit = weights.abs().amax((1, 2)).view(-1, 1, 1) / (6 * 448)
    best, found = None, blocks
    for ratio in ratios:
        most = min(448.0, 256.0 if len(ratios) > 1 else 448.0) / 448  # Four-over-Six leaves room for 1.5 times as much
        wide = unit / most
        scale = (blocks.abs().amax(-1) / ratio / wide).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * wide
        values = nearest(2 * blocks / scale.unsqueeze(-1)) / 2 * scale.unsqueeze(-1)
        error = (values - blocks).square().sum(-1, keepdim=True)
        found = values if best is None else torch.where(error < best, values, found)
        best = error if best is None else torch.minimum(error, best)
    return found.flatten(-2)


def ocp_rule(weights: Tensor) -> Tensor:
    """MXFP4 as compressed-tensors rounds it."""
    scheme = Scheme(mxfp4.FORMAT, 4, 32)
    assert mxfp4.FORMAT.nearest is not None
    packed = mxfp4.FORMAT.nearest([""] * len(weights), weights, scheme)
    return mxfp4.FORMAT.unpack(scheme, weights.shape[1:], lambda suffix: packed[suffix])  # type: ignore[arg-type]


RULES: dict[str, Rule] = {
    "rule: NVFP4 by the maximum": lambda w: nvfp4_rule(w, (6.0,)),
    "rule: NVFP4 Four-over-Six": lambda w: nvfp4_rule(w, (6.0, 4.0)),
    "rule: MXFP4 of OCP": ocp_rule,
}


class RuleJudge(Judge):
    """Scores experts that a rule rounds in memory as well."""

    rule: Rule | None = None

    def _predictions(self, source: Source) -> Iterator[Tensor]:
        if self.rule is None:
            yield from super()._predictions(source)
            return
        g, outside = source.geometry, read_globals(source, self.device)
        layers = []
        for layer in range(g.layers):
            weights = read_layer(source, layer, self.device)
            both = self.rule(torch.cat((weights.gate, weights.up), 1))
            gate, up = both.chunk(2, 1)
            layers.append(dataclasses.replace(weights, gate=gate, up=up, down=self.rule(weights.down)))
        for part in self.tokens.split(BATCH):
            hidden = embed(outside, part)
            for weights in layers:
                hidden = layer_forward(weights, g, hidden)
            yield torch.log_softmax(final_logits(outside, g, hidden), -1)


def write(arguments: str, out: Path, a: argparse.Namespace) -> None:
    """Run one command."""
    calibration = ["--text", str(a.text), "--windows", str(a.windows), "--context", "512"]
    words = [*arguments.split(), "--model", a.model, "--out", str(out), "--device", a.device]
    line = [sys.executable, "-m", "mmquant", *words, *([] if "rtn" in arguments else calibration)]
    done = subprocess.run(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr}")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--text", type=Path, required=True, help="calibration text")
    arguments.add_argument("--windows", type=int, default=200)
    arguments.add_argument("--judge", type=Path, required=True, help="text to judge by")
    arguments.add_argument("--judge-windows", type=int, default=60)
    arguments.add_argument("--split", type=int, default=38)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--only", default="", help="rows whose arguments hold one of these, separated by commas")
    arguments.add_argument("--arguments", action="append", help="a row of one's own; repeatable")
    arguments.add_argument("--rules", action="store_true", help="only the rules")
    a = arguments.parse_args()
    source = open_native(a.model)
    tokens = windows(a.judge.read_text(), load_tokenizer(source), 512, a.judge_windows)
    judge = RuleJudge(source, tokens, a.split, a.device)
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs; judged by {a.judge.name}")
    print("| mmquant ... | mean KLD | 99.9 % | top-1 % | first windows | rest | bytes |")
    for name, rule in RULES.items():
        if any(word in name for word in a.only.split(",")):
            judge.rule = rule
            print(f"| {name} |{judge.row(source)} |", flush=True)
    judge.rule = None
    for line in [] if a.rules else a.arguments or COMMANDS:
        if any(word in line for word in a.only.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                write(line, out, a)
                size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
                print(f"| {line} |{judge.row(open_source(out))} {size:,} |", flush=True)


if __name__ == "__main__":
    main()
