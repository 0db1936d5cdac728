"""Plans against stock mixes of the same bytes, and predicted against measured.

    python bench/plan.py --folder out [--text calibration.txt] [--judge evaluation.txt] [--sensitivity sensitivity.json]

For each mix: our own file of it, and our file of a plan at no more bytes; mean KLD by `mmquant eval --convention
llama.cpp` on each judged text's domains; the bundled texts, unless others are named. Then the rank correlation of
predicted and measured KLD over all files (mixes, plans, and --more plans at sizes between). What lies in --folder
finished is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
import numpy as np
from scipy.stats import rankdata

import mmquant
from mmquant import EvalOptions, GgufOptions, PlanOptions
from mmquant.calibration.plan.sensitivity import Sensitivity, read_sensitivity
from mmquant.convert.gguf.mixes import find_mix, tensor_types
from mmquant.convert.open import open_native

MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_S")


def write(a: argparse.Namespace, label: str, *, type: str = "Q4_K_M", plan: Path | None = None) -> Path:
    """Our file of a mix or a plan."""
    options = GgufOptions(text=tuple(a.text), windows=a.windows, context=a.context, name="m", type=type, plan=plan)
    return mmquant.quantize_gguf(a.model, a.folder / label, options).path


def planned(a: argparse.Namespace, label: str, size: int) -> tuple[Path, float]:
    """Our file of a plan for `size` bytes, and its predicted KLD."""
    found = mmquant.plan(a.model, a.folder / f"{label}-plan", PlanOptions(size=size, sensitivity=a.sensitivity))
    return write(a, label, plan=found.path), found.plan.kld


def predicted(known: Sensitivity, types: dict[str, str]) -> float | None:
    """KLD of a mix, where all of its types were measured."""
    kinds = {name: types[name] for name in known.groups}
    if any(kind not in known.groups[name].error for name, kind in kinds.items()):
        return None
    return sum(known.groups[name].cost(kind) for name, kind in kinds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", action="append", default=[], help="as of gguf --text; default: the bundled text")
    parser.add_argument(
        "--judge", action="append", default=[], help="[DOMAIN=]PATH, as of eval --text; default: bundled"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--judge-windows", type=int, default=60)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--mix", nargs="*", default=list(MIXES))
    parser.add_argument("--more", type=float, nargs="*", default=[0.9, 1.1], help="sizes of more plans, times a mix's")
    a = parser.parse_args()
    if a.sensitivity is None:
        options = PlanOptions(bits=4.0, text=tuple(a.text), windows=a.windows, context=a.context)
        a.sensitivity = mmquant.plan(a.model, a.folder / "sensitivity", options).sensitivity
    known, g = read_sensitivity(a.sensitivity), open_native(a.model).geometry
    files: dict[str, tuple[Path, float | None]] = {}
    for mix in a.mix:
        stock = write(a, f"{mix}-stock", type=mix)
        size = stock.stat().st_size
        files[f"{mix} stock"] = stock, predicted(known, tensor_types(find_mix(mix), g))
        files[f"{mix} planned"] = planned(a, f"{mix}-planned", size)
        for share in a.more:
            files[f"{mix} x {share}"] = planned(a, f"{mix}-{share}", int(share * size))
    chosen = EvalOptions(text=tuple(a.judge), windows=a.judge_windows, context=a.context, convention="llama.cpp")
    found = mmquant.evaluate([path for path, _ in files.values()], a.model, chosen)
    assert found is not None
    scores = found.document["candidates"]
    domains = list(scores[0]["domains"])
    print("file | bytes | predicted | mean KLD |", " | ".join(domains))
    for (label, (path, guess)), score in zip(files.items(), scores, strict=True):
        each = " | ".join(f"{score['domains'][domain]['kld']['mean']:.4f}" for domain in domains)
        word = "-" if guess is None else f"{guess:.4f}"
        print(f"{label} | {path.stat().st_size} | {word} | {score['kld']['mean']:.4f} | {each}")
    pairs = [(guess, score["kld"]["mean"]) for (_, guess), score in zip(files.values(), scores, strict=True) if guess]
    ranks = [rankdata(values) for values in zip(*pairs, strict=True)]
    print(f"rank correlation over {len(pairs)} files: {np.corrcoef(ranks)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
