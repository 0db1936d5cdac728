"""A small model with the demo's tokenizer, a recipe of every kind, and the same artifacts made one by one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.hub_server import HubServer
from helpers.paths import ROOT
from helpers.tiny import write_tiny
from mmquant.convert.open import demo_folder
from mmquant.convert.source import CARRIED_FILES
from mmquant.monitor import Silent
from mmquant.runs.calibrate import calibrate
from mmquant.runs.fp4 import quantize_mxfp4, quantize_nvfp4
from mmquant.runs.fp8 import quantize_fp8
from mmquant.runs.gguf import quantize_gguf
from mmquant.runs.int4 import quantize_int4
from mmquant.runs.mlx import quantize_mlx
from mmquant.runs.recipe.read import Recipe, parse_recipe

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 3, "vocab_size": 2048}
SIZES |= {"num_attention_heads": 8, "num_hidden_layers": 3, "max_position_embeddings": 512}
WRITERS = {
    "fp8": quantize_fp8,
    "int4": quantize_int4,
    "nvfp4": quantize_nvfp4,
    "mxfp4": quantize_mxfp4,
    "mlx": quantize_mlx,
    "gguf": quantize_gguf,
    "calibrate": calibrate,
}
# Short texts of our own: the bundled ones take a second to read, each time that a process is killed.
CALIBRATION, EVALUATION = demo_folder() / "README.md", ROOT / "CONTRIBUTING.md"
TEXT = f"corpora: {{main: {{text: {CALIBRATION}, evaluation: {EVALUATION}, text_only: true, windows: 4, context: 32}}}}"
VARIANTS = """
  fp8: {command: fp8, max_shard_size: 1MB}
  int4-g32: {command: int4, group_size: 32}
  int4-g64: {command: int4, group_size: 64}
  Q4_K_M: {command: gguf, type: Q4_K_M, max_part_size: 900KB}
  Q3_K_S: {command: gguf, type: Q3_K_S}
  fast: {command: gguf, type: Q3_K_S, effort: fast}
  fast-2: {command: gguf, type: Q2_K, effort: fast}
  rtn: {command: gguf, type: Q8_0}
  statistics: {command: calibrate, moments: full, imatrix: imatrix.gguf}
"""
# Names that say when, who and where: not the artifact's.
APART = ("generated",)


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def model(folder: Path, **changes: Any) -> Path:
    """A checkpoint of three layers that has a tokenizer, a chat template and a licence."""
    write_tiny(folder, shards=5, **{**SIZES, **changes})
    for name in CARRIED_FILES:
        if (demo_folder() / name).is_file():
            shutil.copy(demo_folder() / name, folder / name)
    return folder


def recipe(model: Path | str, variants: str = VARIANTS, more: str = "") -> Recipe:
    return parse_recipe(f"model: {model}\n{TEXT}\nvariants:{variants}{more}", "recipe.yaml")


def alone(wanted: Recipe, out: Path) -> None:
    """Every variant by its own command."""
    for variant in wanted.variants:
        folder, options = out / variant.name, variant.options
        if variant.command == "calibrate":  # --imatrix is a path; a recipe names it inside the folder
            calibrate(wanted.model, folder, replace(options, imatrix=folder / options.imatrix), device="cpu")
        else:
            WRITERS[variant.command](wanted.model, folder, options, device="cpu")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that is published, by path; of a manifest without its date."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        data = path.read_bytes()
        if path.name == "mmquant.fit.json":
            document = json.loads(data)
            document = {name: value for name, value in document.items() if name not in APART}
            data = json.dumps(document, sort_keys=True).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def artifacts(folder: Path) -> dict[str, str]:
    """The same of a run's artifacts, without what is the run's own."""
    return {name: digest for name, digest in digests(folder).items() if "/" in name}


def serve(hub: HubServer, folder: Path, name: str = "org/m") -> str:
    """The checkpoint as a repository of a hub; what a recipe calls it."""
    hub.seed(name, {p.name: p.read_bytes() for p in folder.iterdir()})
    return f"hf:{name}"
