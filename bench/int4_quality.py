"""INT4 methods side by side: each writes a folder, the folder is read back, and its distance to the source is measured.

    python bench/int4_quality.py --text calibration.txt --evaluation evaluation.txt [--device cuda] [--only gptq,awq]

Windows of 512 tokens; every position is scored; the forward is float32. `--split N` also gives the mean of the first N
windows and of the rest (two domains). Reference: the checkpoint's own weights.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _path import use_checkout
from torch import Tensor

use_checkout()

from mmquant.calibration.corpus import Corpus  # noqa: E402
from mmquant.calibration.forward import embed, final_logits, layer_forward  # noqa: E402
from mmquant.calibration.int4_high import LearnOptions  # noqa: E402
from mmquant.calibration.int4_layer import Int4Options  # noqa: E402
from mmquant.calibration.int4_variant import CalibratedInt4  # noqa: E402
from mmquant.calibration.live import LivePass, PassOptions  # noqa: E402
from mmquant.calibration.windows import load_tokenizer, windows  # noqa: E402
from mmquant.convert.int4_variant import Int4Variant  # noqa: E402
from mmquant.convert.open import open_native, open_source  # noqa: E402
from mmquant.convert.selfcheck import check_folder  # noqa: E402
from mmquant.convert.source import Source, read_globals, read_layer  # noqa: E402
from mmquant.pipeline import write_folder  # noqa: E402
from mmquant.quantize.gptq import Grid  # noqa: E402

BATCH = 10


def variants(steps: int) -> Iterator[tuple[str, Int4Variant]]:
    """(name, artifact) of every row."""
    for group in (128, 64, 32):
        for attention in ("int4", "bf16"):
            where = f"g{group} attention {attention}"
            shape = {"group_size": group, "attention": attention}
            yield f"rtn {where}", Int4Variant(**shape)

            def gptq(effort: str, shape: dict = shape, **more: object) -> CalibratedInt4:
                grid = Grid(4, shape["group_size"])
                options = Int4Options(effort=effort, grid=grid, attention=shape["attention"], **more)  # type: ignore[arg-type]
                return CalibratedInt4(
                    **shape, options=options, learning=LearnOptions(steps=steps), report=lambda line: None
                )

            yield f"gptq {where}", gptq("default")
            yield f"high {where}", gptq("high")
            for effort in ("default", "high"):
                options = Int4Options("awq", effort, Grid(4, group, False), attention)
                awq = CalibratedInt4(**shape, symmetric=False, layout="awq", options=options, report=lambda line: None)
                yield f"awq {effort} {where}", awq


class Judge:
    """Reference log-probabilities of the evaluation windows, and the distance of another model to them."""

    def __init__(self, source: Source, tokens: Tensor, split: int, device: str) -> None:
        self.source, self.tokens, self.split, self.device = source, tokens, split, device
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
        text = f"| {kld.mean():.4f} | {kld.flatten().quantile(0.999):.3f} | {100 * top.mean():.2f} |"
        if self.split:
            text += f" {kld[: self.split].mean():.4f} | {kld[self.split :].mean():.4f} |"
        return text


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="demo")
    arguments.add_argument("--text", type=Path, required=True)
    arguments.add_argument("--windows", type=int, default=200)
    arguments.add_argument("--evaluation", type=Path, required=True)
    arguments.add_argument("--evaluation-windows", type=int, default=60)
    arguments.add_argument("--split", type=int, default=0)
    arguments.add_argument("--steps", type=int, default=LearnOptions.steps)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--only", default="", help="rows whose name holds one of these, separated by commas")
    a = arguments.parse_args()
    source = open_native(a.model)
    tokenizer = load_tokenizer(source)
    tokens = windows(a.text.read_text(), tokenizer, 512, a.windows)
    corpus = Corpus(tokens, torch.zeros(len(tokens), dtype=torch.int64), ("text",), {})
    judge = Judge(source, windows(a.evaluation.read_text(), tokenizer, 512, a.evaluation_windows), a.split, a.device)
    print("| artifact | mean KLD | 99.9 % | top-1 % | first windows | rest | bytes | seconds |")
    for name, variant in variants(a.steps):
        if not any(word in name for word in a.only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            provider = None
            if isinstance(variant, CalibratedInt4):
                learned = variant.options.learned
                options = PassOptions(propagate="quantized" if learned else "reference", device=a.device)
                provider = LivePass(source, corpus, options, hidden=learned)
            out = write_folder(source, variant, Path(folder) / "out", device=a.device, provider=provider)
            taken = time.perf_counter() - start
            check_folder(out, source)
            size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
            print(f"| {name} {judge.row(open_source(out))} {size:,} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
