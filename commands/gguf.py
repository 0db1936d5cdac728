"""`mmquant gguf`: write a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.errors import InputError

from ..runs.options import GgufOptions
from .options import begin, idle_text, refuse_idle_plan, refuse_without_effect, several, show
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(GgufOptions, repeat="type")
def command(
    model: str,
    out: Path,
    options: GgufOptions,
    every: dict[str, GgufOptions],
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
) -> None:
    """Write a GGUF file that stock llama.cpp loads.

    Types below 8 bits are calibrated in the same pass: each matrix is corrected for what the layers before it lost and
    rounded with error feedback. F32, F16, BF16 and Q8_0 need no calibration.

    --size and --target choose the type of every matrix by what it costs on this model, measured first (docs/plan.md).

    Example: mmquant gguf --model demo --type Q4_K_M --out ./demo-gguf
    """
    from ..runs.gguf import check_options, is_calibrated, quantize_gguf

    for chosen in every.values():
        check_options(chosen)
    for chosen in [chosen for chosen in every.values() if is_calibrated(chosen)] or every.values():
        refuse_idle_options(chosen)
    if len(every) > 1:
        if options.name is not None:
            raise InputError(f"--name {options.name}: names one file, expected one --type")
        several(model, out, "gguf", every, device=device, fetch=fetch, dry_run=dry_run)
        return
    begin(out, dry_run)
    show(quantize_gguf(model, out, options, device=device, fetch=fetch, dry_run=dry_run))


def refuse_idle_options(options: GgufOptions) -> None:
    """InputError for options that would change nothing of what was asked for."""
    from ..convert.gguf.mixes import find_mix
    from ..runs.gguf import is_calibrated

    text, mix = idle_text(options), find_mix(options.type)
    if not is_calibrated(options):
        no = options.no_calibration
        why = "with --no-calibration" if no else f"with --type {mix.name}, which is not calibrated"
        refuse_without_effect(why, *text, "statistics", "effort")
    elif options.statistics is not None:
        refuse_without_effect("with --statistics, which stands for the text", *text)
    if not options.text:
        refuse_without_effect("without --text", "text_only")
    refuse_idle_plan(options, *(("type",) if options.plan is None else ()))
