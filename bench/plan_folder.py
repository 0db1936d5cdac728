"""Plans of folders against one width everywhere, and against wider first and last layers, at no more bytes.

    python bench/plan_folder.py --format int4 --folder out [--text calibration.txt] [--judge evaluation.txt]

For each row of RULES: our folder by that rule, and our folder of a plan at no more bytes; mean KLD of both by `mmquant
eval`, and the rank correlation of predicted and measured KLD over all folders. What lies in --folder finished is not
made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import numpy as np
from scipy.stats import rankdata

import mmquant
from mmquant import EvalOptions, Int4Options, Mxfp4Options, Nvfp4Options, PlanOptions
from mmquant.calibration.plan.sensitivity import read_sensitivity
from mmquant.convert.open import open_native
from mmquant.errors import FitError
from mmquant.runs.int4 import layers_of

WRITE = {
    "int4": (mmquant.quantize_int4, Int4Options),
    "nvfp4": (mmquant.quantize_nvfp4, Nvfp4Options),
    "mxfp4": (mmquant.quantize_mxfp4, Mxfp4Options),
}
RULES: dict[str, list[dict[str, Any]]] = {
    "int4": [
        {"group_size": 128},
        {"group_size": 32},
        {"group_size": 32, "attention": "fp8"},
        {"group_size": 128, "attention": "fp8", "eight_bit": "FIRST"},
        {"group_size": 128, "attention": "fp8", "eight_bit": "LAST"},
        {"group_size": 128, "attention": "fp8", "eight_bit": "FIRST,LAST"},
    ],
    "nvfp4": [{"attention": "nvfp4"}, {}, {"attention": "fp8"}],
    "mxfp4": [{"attention": "mxfp4"}, {}, {"attention": "fp8"}],
}


def write(a: argparse.Namespace, label: str, **chosen: object) -> Path:
    """Our folder by a rule or a plan."""
    run, kind = WRITE[a.format]
    options = kind(text=tuple(a.text), windows=a.windows, context=a.context, **chosen)
    return run(a.model, a.folder / label, options).path


def shards(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def kinds(form: str, rule: dict[str, Any], layers: int) -> dict[str, str]:
    """The kind of every unit that a rule gives."""
    wide, found = layers_of(rule.get("eight_bit")), {}
    for layer in range(layers):
        narrow = f"int4-g{rule['group_size']}" if form == "int4" else form
        found[f"layers.{layer}.experts"] = f"int8-g{rule['group_size']}" if layer in wide else narrow
        attention = rule.get("attention", "bf16")
        found[f"layers.{layer}.attention"] = narrow if attention == form else attention
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--format", choices=list(WRITE), default="int4")
    parser.add_argument("--text", action="append", default=[], help="as of int4 --text; default: the bundled text")
    parser.add_argument(
        "--judge", action="append", default=[], help="[DOMAIN=]PATH, as of eval --text; default: bundled"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--judge-windows", type=int, default=100)
    parser.add_argument("--context", type=int, default=512)
    a = parser.parse_args()
    layers = open_native(a.model).geometry.layers
    ends = {"FIRST": "0", "LAST": str(layers - 1)}
    measured = PlanOptions(
        bits=16.0, format=a.format, text=tuple(a.text), windows=a.windows, context=a.context, judged_windows=24
    )
    known = read_sensitivity(path := mmquant.plan(a.model, a.folder / "sensitivity", measured).sensitivity)
    folders: dict[str, tuple[Path, float]] = {}
    for rule in RULES[a.format]:
        for word, layer in ends.items():
            if "eight_bit" in rule:
                rule = rule | {"eight_bit": rule["eight_bit"].replace(word, layer)}
        label = "-".join(str(value) for value in rule.values()) or "default"
        plain = write(a, label, **rule)
        units = kinds(a.format, rule, layers)
        folders[label] = plain, sum(known.groups[name].cost(kind) for name, kind in units.items())
        options = PlanOptions(size=shards(plain), format=a.format, sensitivity=path)
        try:
            plan = mmquant.plan(a.model, a.folder / f"{label}-plan", options)
        except FitError:  # the rule is the smallest that there is
            continue
        folders[f"{label} planned"] = write(a, f"{label}-planned", plan=plan.path), plan.plan.kld
    chosen = EvalOptions(text=tuple(a.judge), windows=a.judge_windows, context=a.context)
    found = mmquant.evaluate([path for path, _ in folders.values()], a.model, chosen)
    assert found is not None
    scores = found.document["candidates"]
    domains = list(scores[0]["domains"])
    print("folder | bytes | predicted | mean KLD |", " | ".join(domains))
    for (label, (folder, guess)), score in zip(folders.items(), scores, strict=True):
        each = " | ".join(f"{score['domains'][domain]['kld']['mean']:.4f}" for domain in domains)
        print(f"{label} | {shards(folder)} | {guess:.4f} | {score['kld']['mean']:.4f} | {each}")
    pairs = [(guess, score["kld"]["mean"]) for (_, guess), score in zip(folders.values(), scores, strict=True)]
    ranks = [rankdata(values) for values in zip(*pairs, strict=True)]
    print(f"rank correlation over {len(pairs)} folders: {np.corrcoef(ranks)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
