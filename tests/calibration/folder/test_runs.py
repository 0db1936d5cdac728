"""Runs in one process do not affect each other: equal runs of a variant write equal bytes."""

from __future__ import annotations

import ast
from pathlib import Path

from helpers.calibration_cases import corpus
from helpers.paths import SOURCE
from helpers.tiny import write_tiny
from mmquant.calibration.folder.options import LayerOptions
from mmquant.calibration.folder.variant import CalibratedWeights
from mmquant.calibration.model.signround_layer import SignRoundOptions
from mmquant.calibration.statistics.live import LivePass, PassOptions
from mmquant.convert.open import open_native
from mmquant.quantize.integer.gptq_grid import GptqGrid
from mmquant.runs.folder import write_folder

PACKAGES = ("mmquant", "commands", "runs", "calibration", "convert", "quantize")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_a_variant_may_be_used_twice(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4, "num_hidden_layers": 2}
    source = open_native(write_tiny(tmp_path / "model", **sizes))
    variant = CalibratedWeights(
        group_size=32,
        options=LayerOptions(effort="high", grid=GptqGrid(4, 32)),
        learning=SignRoundOptions(steps=3),
        report=lambda line: None,
    )
    for name in ("first", "second"):
        provider = LivePass(source, corpus(windows=8, context=16), PassOptions(propagate="quantized"), hidden=True)
        write_folder(source, variant, tmp_path / name, provider=provider)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def frozen(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) and "frozen=True" in ast.unparse(d) for d in node.decorator_list)


def state_of(tree: ast.Module) -> list[str]:
    """`global` statements, empty containers of a module, and objects that frozen dataclasses make for themselves."""
    found = [f"global {', '.join(n.names)}" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    for node in (n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and n.value is not None):
        if node.value is not None and ast.unparse(node.value) in ("{}", "[]", "set()", "dict()", "list()"):
            found.append(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and frozen(n)):
        for line in (line for line in node.body if isinstance(line, ast.AnnAssign) and line.value is not None):
            words = ast.unparse(line.value) if line.value is not None else ""
            if "default_factory=" in words:
                made = words.split("default_factory=")[1].split(",")[0].rstrip(")")
                found.append(f"{node.name}.{ast.unparse(line.target)}: {made}")
    return found


ALLOWED = {"convert/files/atomic.py _warned"}  # one warning a file system
ALLOWED |= {"calibration/model/forward.py EXACT"}  # a default that nobody fills
ALLOWED |= {"calibration/model/distributed.py _WATCHDOGS"}  # a process is in one group, as torch.distributed has it


def test_frozen_dataclasses_hold_no_state_and_modules_no_globals() -> None:
    classes: dict[str, bool] = {}
    found: list[str] = []
    for path in (p for package in PACKAGES for p in sorted((SOURCE / package).rglob("*.py"))):
        tree = ast.parse(path.read_text("utf-8"))
        classes |= {n.name: frozen(n) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        found += [f"{path.relative_to(SOURCE).as_posix()} {line}" for line in state_of(tree)]
    made = {line: line.partition(": ")[2] for line in set(found) - ALLOWED}
    assert not [line for line, what in made.items() if not what or classes.get(what) is False]
