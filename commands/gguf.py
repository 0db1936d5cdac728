"""`mmquant gguf`: write a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import InputError

from .options import (
    SEED,
    begin,
    device_option,
    dry_run_option,
    fresh_option,
    model_option,
    out_option,
    refuse_without_effect,
    size,
)
from .options_calibration import text_only_option
from .options_fetch import fetch_options, open_model

if TYPE_CHECKING:
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
@click.option(
    "--max-part-size",
    default="48GB",
    show_default=True,
    callback=size,
    help="Largest file; more become -00001-of-0000N.",
)
@click.option("--text", "texts", multiple=True, help="Calibration text: file, folder or `default`, PATH[=WEIGHT].")
@text_only_option()
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows at most.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the documents' order.")
@click.option("--statistics", type=FILE, help="Instead of text: what `calibrate --out` wrote, or an imatrix .gguf.")
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "high"]),
    default="default",
    show_default=True,
    help="fast: a weighted search; default: correction and error feedback; high: on four times as many windows.",
)
@click.option("--no-calibration", is_flag=True, help="Every weight to its nearest point; no text is read.")
@device_option()
@fetch_options()
@fresh_option()
@dry_run_option()
def command(
    model: str,
    out: Path,
    kind: str,
    overrides: tuple[str, ...],
    plan: Path | None,
    name: str | None,
    max_part_size: int,
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
    from ..convert.gguf.plan import make_plan
    from ..convert.gguf.variant import GgufVariant
    from ..runs.folder import describe
    from ..runs.gguf import check_gguf, check_stem, make_calibration, model_stem, read_plan, write_gguf

    if statistics is not None and (text["texts"] or no_calibration):
        raise InputError("--statistics: stands instead of --text, and contradicts --no-calibration")
    mix = find_mix(kind)
    calibrated = not no_calibration and mix.base not in (*PLAIN, "Q8_0")
    if not calibrated:
        why = "with --no-calibration" if no_calibration else f"with --type {mix.name}, which is not calibrated"
        refuse_without_effect(why, "texts", "text_only", "context", "windows", "seed", "statistics", "effort")
    elif statistics is not None:
        refuse_without_effect("with --statistics, which stands for the text", "text_only", "context", "windows", "seed")
    if name is not None:
        check_stem(name)
    changed = parse_overrides(overrides)
    source = open_model(model, fetch, begin(out, dry_run))
    stem = name if name is not None else f"{model_stem(model)}-{mix.name}"
    variant = GgufVariant(mix, stem, calibrated, changed, read_plan(plan), part_bytes=max_part_size)
    if dry_run:
        size = make_plan(source, variant, None).bytes
        click.echo(describe(out, variant.label, size))
        text |= {"calibrated": calibrated and statistics is None, "effort": effort}
        check_gguf(source, variant, out, size, device, text)
        return
    calibration = make_calibration(source, effort, statistics, text) if calibrated else None
    click.echo(write_gguf(source, variant, out, calibration=calibration, device=device))
