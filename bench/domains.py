"""Quality across domains: calibrate on one or all, judge on each, against stock at equal bytes.

    python bench/domains.py --model MODEL --text TEXT --calibrate code mix --type Q4_K_M INT4 --out rows.jsonl

TEXT holds calibration_DOMAIN.txt, tuning_DOMAIN.txt, evaluation_DOMAIN.txt (bench/dev_model/pack.py). `mix` takes the
windows of all domains in turn, `not-code` all but one. INT4 is W4A16 in groups of 128 (stock: round to nearest with the
same search of scales). Choices are made on --side tuning; `evaluation` is what is reported. Every row: mean, 99.9 %
and largest KLD, perplexity over the reference's, and the ratio of the mean to stock's with a 95 % interval (paired,
bootstrap over windows). Stock needs the llamacpp extra.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent))
import torch
from domain_lab import Distance, Lab, Whole
from torch import Tensor

from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.gguf.solve import METHODS, Method
from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack_windows, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.open import open_native
from mmquant.convert.source import Source

Settings = TypeVar("Settings", Method, LayerOptions)

TYPES = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS", "INT4")
CONTEXT = 512


def read_sides(folder: Path, side: str, model: str, count: int) -> dict[str, Tensor]:
    """Windows [W, 512] of a side's domains."""
    tokenizer = load_tokenizer(open_native(model))
    files = sorted(folder.glob(f"{side}_*.txt"))
    return {
        f.stem.removeprefix(side + "_"): windows(f.read_text(encoding="utf-8"), tokenizer, CONTEXT, count)
        for f in files
    }


def chosen_windows(domains: dict[str, Tensor], name: str, count: int, source: Source) -> Tensor:
    """Of one domain, of all (`mix`) or all but one (`not-NAME`), in turn; NAME@N takes N windows instead, NAME+EXTRA:N
    adds N windows of the bundled text (`bundled`) or of tokens drawn evenly over the vocabulary (`random`)."""
    name, *extras = name.split("+")
    if extras:
        more = [generic(source, *extra.split(":")) for extra in extras]
        return torch.cat((chosen_windows(domains, name, count, source), *more))
    name, _, number = name.partition("@")
    count = int(number or count)
    if name in domains:
        return domains[name][:count]
    kept = [tokens for domain, tokens in domains.items() if name != f"not-{domain}"]
    each = -(-count // len(kept))
    return torch.stack([t[i] for i in range(each) for t in kept if i < len(t)])[:count]


def generic(source: Source, kind: str, number: str) -> Tensor:
    count = int(number)
    if kind == "random":
        g = torch.Generator().manual_seed(5)
        return torch.randint(0, source.geometry.vocab, (count, CONTEXT), generator=g)
    sets = read_sets([str(bundled("calibration"))], load_template(source))
    return pack_windows(sets, load_tokenizer(source), CONTEXT, count).tokens


def method_of(text: str) -> Method:
    """`default`, or with fields changed: `default,damping=0.2,correct=0`."""
    return changed(METHODS[text.partition(",")[0]], text)


def changed(fields: Settings, text: str) -> Settings:
    """A dataclass with the fields of "name,field=value,...", of the types that they have."""
    values = dict(change.split("=") for change in text.split(",")[1:])
    return replace(fields, **{key: type(getattr(fields, key))(float(value)) for key, value in values.items()})


def interval(ours: Distance, stock: Distance) -> tuple[float, float]:
    """95 % of the ratio of means, windows drawn in pairs."""
    a, b = ours.kld.mean(1), stock.kld.mean(1)
    draw = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))
    ratio = a[draw].mean(1) / b[draw].mean(1)
    return float(ratio.quantile(0.025)), float(ratio.quantile(0.975))


def base_of(calibrated: str) -> str:
    """The domain that stock is calibrated on for this row."""
    return calibrated.partition("+")[0].partition("@")[0]


class Bench:
    """Makes models and prints their rows; stock's distances are kept for the ratios."""

    def __init__(self, lab: Lab, threads: int, out: Path | None) -> None:
        self.lab, self.threads, self.out = lab, threads, out
        self.known: dict[tuple[str, str], dict[str, Distance]] = {}

    def make(self, kind: str, method: str, tokens: Tensor) -> Whole:
        if kind == "INT4":
            return self.lab.nearest() if method == "stock" else self.lab.int4(changed(LayerOptions(), method), tokens)
        if method == "stock":
            return self.lab.stock(kind, self.lab.importance(tokens), self.threads)
        return self.lab.gguf(kind, method_of(method), tokens)

    def row(self, kind: str, method: str, calibrated: str, tokens: Tensor) -> None:
        start = time.perf_counter()
        model = self.make(kind, method, tokens)
        seconds = time.perf_counter() - start
        found = self.lab.distance(model)
        if method == "stock":
            self.known[kind, base_of(calibrated)] = found
        stock = self.known.get((kind, base_of(calibrated)))
        line = []
        for domain, distance in found.items():
            row = {"type": kind, "method": method, "calibrated": calibrated, "domain": domain, **distance.row()}
            if stock is not None and method != "stock":
                low, high = interval(distance, stock[domain])
                row |= {"ratio": row["kld"] / float(stock[domain].kld.mean()), "low": low, "high": high}
            line.append(f"{domain} {row['kld']:.4f}" + (f" {row['ratio']:.2f}x" if "ratio" in row else ""))
            if self.out is not None:
                with self.out.open("a") as file:
                    file.write(json.dumps({**row, "seconds": seconds}) + "\n")
        print(f"{kind:8} {method:10} {calibrated:6} {seconds:6.1f} s  " + "  ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibrate", nargs="*", default=["code", "mix"])
    parser.add_argument("--type", nargs="*", default=list(TYPES))
    parser.add_argument("--method", nargs="*", default=["stock", "default"])
    parser.add_argument("--side", default="tuning", choices=("tuning", "evaluation"))
    parser.add_argument("--judge", nargs="*", help="domains to judge; default all")
    parser.add_argument("--windows", type=int, default=128, help="of calibration")
    parser.add_argument("--judge-windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    judged = read_sides(options.text, options.side, options.model, options.judge_windows)
    judged = {name: t for name, t in judged.items() if not options.judge or name in options.judge}
    calibration = read_sides(options.text, "calibration", options.model, options.windows)
    bench = Bench(Lab(options.model, judged, options.device), options.threads, options.out)
    for calibrated in options.calibrate:
        tokens = chosen_windows(calibration, calibrated, options.windows, bench.lab.source)
        for kind in options.type:
            for method in (
                options.method if calibrated == base_of(calibrated) else [m for m in options.method if m != "stock"]
            ):
                bench.row(kind, method, calibrated, tokens)


if __name__ == "__main__":
    main()
