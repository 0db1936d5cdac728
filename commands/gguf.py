"""mmquant gguf."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import InputError

from .options import device_option, dry_run_option, model_option, out_option, parse_size
from .options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from ..calibration.gguf.run import Calibration
    from ..calibration.gguf.run_stored import Stored
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions


FILE = click.Path(path_type=Path)


@click.command(short_help="GGUF for llama.cpp.")
@model_option()
@out_option()
@click.option(
    "--type", "kind", default="Q4_K_M", show_default=True, help="Any mix of llama-quantize: Q4_K_M, IQ3_XXS ..."
)
@click.option(
    "--tensor-type", "overrides", multiple=True, help="REGEX=TYPE, as in llama-quantize; the first match wins."
)
@click.option("--plan", type=FILE, help="JSON: tensor name -> type, or that under `tensors`.")
@click.option("--name", default=None, help="Name of the file without .gguf; default: model and type.")
@click.option("--max-part-size", default="48GB", show_default=True, help="Largest file; more become -00001-of-0000N.")
@click.option("--text", "texts", multiple=True, help="Calibration text: file, folder or `default`, PATH[=WEIGHT].")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows at most.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the documents' order.")
@click.option("--statistics", type=FILE, help="Instead of text: what `calibrate --out` wrote, or an imatrix .gguf.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "high"]),
    default="default",
    show_default=True,
    help="fast: a weighted search; default: correction and error feedback; high: codes learned after that.",
)
@click.option("--no-calibration", is_flag=True, help="Every weight to its nearest point; no text is read.")
@device_option()
@fetch_options()
@dry_run_option()
def command(
    model: str,
    out: Path,
    kind: str,
    overrides: tuple[str, ...],
    plan: Path | None,
    name: str | None,
    max_part_size: str,
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
    statistics: Path | None,
    effort: str,
    no_calibration: bool,
    **text: Any,
) -> None:
    """Write a GGUF file that stock llama.cpp loads.

    Types below 8 bits are calibrated in the same pass: each matrix is corrected for what the layers before it lost and
    rounded with error feedback. F32, F16, BF16 and Q8_0 need no calibration.

    Example: mmquant gguf --model demo --type Q4_K_M --out ./m27-gguf
    """
    from ..convert.gguf.mixes import PLAIN, find_mix, parse_overrides
    from ..convert.gguf.variant import GgufVariant
    from ..runs.folder import describe
    from ..runs.gguf import write_gguf

    if statistics is not None and (text["texts"] or no_calibration):
        raise InputError("--statistics: stands instead of --text, and contradicts --no-calibration")
    mix = find_mix(kind)
    changed = parse_overrides(overrides)
    source = open_model(model, fetch, None if dry_run else out)
    stem = name or f"{model_stem(model)}-{mix.name}"
    calibrated = not no_calibration and mix.base not in (*PLAIN, "Q8_0")
    variant = GgufVariant(mix, stem, calibrated, changed, read_plan(plan), part_bytes=parse_size(max_part_size))
    if dry_run:
        click.echo(describe(out, variant.label, sum(part.bytes for part in variant.parts(source, None))))
        return
    calibration = make_calibration(source, effort, statistics, text) if calibrated else None
    click.echo(write_gguf(source, variant, out, calibration=calibration, device=device))


def read_plan(path: Path | None) -> dict[str, str] | None:
    """Types by tensor name of a plan file; ValueError when it is not one."""
    import json

    if path is None:
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    types = document.get("tensors", document) if isinstance(document, dict) else None
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise InputError(f"{path}: expected an object of tensor names and types")
    return types


def make_calibration(
    source: Checkpoint, effort: str, statistics: Path | None, text: dict[str, Any]
) -> Calibration | Stored:
    """Open the statistics, or read, check and pack the calibration text."""
    from ..calibration.gguf.run import Calibration
    from ..calibration.gguf.run_stored import open_stored
    from .calibrate import make_corpus

    if statistics is not None:
        return open_stored(statistics, source, effort)
    corpus = make_corpus(source, {"evaluation": (), **text})
    names = ", ".join(Path(spec.split("=")[0]).name for spec in text["texts"]) or "default"
    return Calibration(corpus.tokens, {"corpus": corpus.describe()}, names, effort)


def model_stem(model: str) -> str:
    """The model's name in a file name: the last part of a hub name or path."""
    bare = model.removeprefix("hf:").removeprefix("ms:").split("@")[0]
    return Path(bare).resolve().name if bare in (".", "..") else bare.rstrip("/").rsplit("/", 1)[-1]
