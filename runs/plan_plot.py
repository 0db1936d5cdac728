"""Draw a plan: the type of every matrix by layer, and the curve of alternatives."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import InputError

from ..calibration.plan.groups import bits_of
from ..convert.folder.kinds import plan_row, stored_bits
from .output import check_output
from .planner import split_name

if TYPE_CHECKING:
    from ..convert.plan_file import PlanFile


def draw(plan: PlanFile, path: Path) -> None:
    """Write a picture of the plan to `path` (png, svg or pdf). InputError where matplotlib is not installed."""
    check_output("--plot", path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {path}: expected a name ending in .png, .svg or .pdf")
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise InputError("--plot: matplotlib is not installed, expected pip install mmquant[report]") from None
    figure = figures.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    roles: dict[str, list[tuple[int, float]]] = {}
    bits = bits_of if plan.format == "gguf" else lambda word: stored_bits(plan_row(plan.format), word)
    for name, kind in plan.tensors.items():
        layer, role = split_name(name)
        if layer is not None:
            roles.setdefault(role, []).append((layer, bits(kind)))
    for role, points in roles.items():
        left.step(*zip(*points, strict=True), where="mid", label=role)
    left.set(
        xlabel="layer", ylabel="bits per weight", title=f"{plan.label}: {plan.bits_per_weight:.2f} bits per weight"
    )
    left.legend(fontsize="small")
    curve = sorted([*((point.bytes, point.kld) for point in plan.curve), (plan.bytes, plan.kld)])
    right.plot([size / 1e9 for size, _ in curve], [kld for _, kld in curve], marker=".")
    right.plot(plan.bytes / 1e9, plan.kld, marker="o")
    right.set(xlabel="GB", ylabel="predicted KLD", yscale="log", title="alternatives")
    figure.savefig(path)
