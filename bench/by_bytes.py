"""Quality by bytes on the demo model: what mmquant writes beside the rules of others, on one ruler.

    python bench/by_bytes.py --folder out                          # a recipe, one pass, then the table
    python bench/by_bytes.py --folder out --keep docs/figures/by-bytes.json # the plot's data

Calibration and evaluation text are the bundled ones. GGUF's other side is ggml's own encoder under llama-imatrix's sums
of the same windows (bench/domain_lab.py); INT4's is round to nearest by the largest value, as llm-compressor's
model-free route does it; those of NVFP4 and MXFP4 are in bench/fp4_quality.py. Mean KLD and top-1 of the second half
of each window, float32. `python docs/figures/draw.py` draws the plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
from pathlib import Path

import _path  # noqa: F401
import torch
from domain_lab import Lab, Whole
from fp4_quality import RULES, Rule
from torch import Tensor

import mmquant
from mmquant.calibration.text.chat import load_template
from mmquant.calibration.text.corpus import bundled, pack_windows, read_sets
from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer

CONTEXT = 512
GGUF = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS")
# Name -> the recipe's variant, and the rule that others use at these bytes.
FOLDERS = {
    "INT4-g128": ("int4, group_size: 128", "INT4 g128 to nearest"),
    "INT4-g32": ("int4, group_size: 32", "INT4 g32 to nearest"),
    "NVFP4": ("nvfp4", "rule: NVFP4 Four-over-Six"),
    "MXFP4": ("mxfp4", "rule: MXFP4 of OCP"),
}


def nearest_rule(group: int) -> Rule:
    """Symmetric INT4 as compressed-tensors rounds it: a group's scale is its largest value over 7.5."""

    def rule(weights: Tensor) -> Tensor:
        groups = weights.unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.5
        return (groups / scale).round().clamp(-8, 7).mul(scale).flatten(-2)

    return rule


def bundled_windows(kind: str, count: int) -> Tensor:
    """Windows [W, 512] of the bundled text."""
    source = open_native("demo")
    sets = read_sets([str(bundled(kind))], load_template(source))
    return pack_windows(sets, load_tokenizer(source), CONTEXT, count).tokens


def recipe(windows: int) -> str:
    """All variants in one pass; the calibration text is the bundled one."""
    lines = [f"  {kind}: {{command: gguf, type: {kind}}}" for kind in GGUF]
    lines += [f"  {name}: {{command: {words}}}" for name, (words, _) in FOLDERS.items()]
    corpus = f"corpora:\n  main: {{text: [default], windows: {windows}, context: {CONTEXT}}}"
    return f"model: demo\n{corpus}\nvariants:\n" + "\n".join(lines) + "\n"


def whole(path: Path) -> tuple[Whole, int]:
    """A file's weights as they read back, and its tensors' bytes."""
    source = mmquant.open_model(path)
    layers = [read_layer(source, layer, "cpu") for layer in range(source.geometry.layers)]
    scored = mmquant.evaluate([path], "demo", ONE)
    assert scored is not None
    return (read_globals(source, "cpu"), layers), scored.rows()[0]["bytes"]


ONE = mmquant.EvalOptions(windows=1, context=64)


def ruled(lab: Lab, rule: Rule) -> Whole:
    """Experts rounded by a rule, all else as it is."""
    layers = []
    for weights in lab.layers:
        gate, up = rule(torch.cat((weights.gate, weights.up), 1)).chunk(2, 1)
        layers.append(dataclasses.replace(weights, gate=gate, up=up, down=rule(weights.down)))
    return lab.outside, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the artifacts lie; finished ones are not made again"
    )
    parser.add_argument("--windows", type=int, default=128, help="of calibration")
    parser.add_argument("--judge-windows", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="JSON for the plot")
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    (a.folder / "recipe.yaml").write_text(recipe(a.windows))
    mmquant.run(a.folder / "recipe.yaml", a.folder / "made")
    lab = Lab("demo", {"all": bundled_windows("evaluation", a.judge_windows)}, "cpu")
    importance = lab.importance(bundled_windows("calibration", a.windows))
    rules = RULES | {"INT4 g128 to nearest": nearest_rule(128), "INT4 g32 to nearest": nearest_rule(32)}
    rows = []
    print("| file | bytes | mean KLD | top-1 % | others by | mean KLD | top-1 % | ratio |")
    for name in (*GGUF, *FOLDERS):
        folder = a.folder / "made" / name
        path = next(folder.glob("*.gguf")) if name in GGUF else folder
        made, size = whole(path)
        theirs = lab.stock(name, importance, 1) if name in GGUF else ruled(lab, rules[FOLDERS[name][1]])
        by = "llama-quantize, imatrix" if name in GGUF else FOLDERS[name][1].removeprefix("rule: ")
        ours, other = (lab.distance(model)["all"].row() for model in (made, theirs))
        row = {"file": name, "bytes": size, "kld": ours["kld"], "top1": ours["top1"], "by": by}
        rows.append(row | {"kld_other": other["kld"], "top1_other": other["top1"]})
        left = f"{name} | {size:,} | {ours['kld']:.4f} | {100 * ours['top1']:.1f}"
        print(
            f"| {left} | {by} | {other['kld']:.4f} | {100 * other['top1']:.1f} | {ours['kld'] / other['kld']:.2f} |",
            flush=True,
        )
    if a.keep is not None:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        machine = f"{platform.machine()} CPU, torch {torch.__version__}"
        document = {"commit": commit, "windows": a.windows, "judged": a.judge_windows, "machine": machine, "rows": rows}
        a.keep.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
