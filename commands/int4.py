"""`mmquant int4`: write an INT4 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.errors import InputError

from ..runs.options import PLAN_FIELDS, Int4Options
from .options import CALIBRATED, begin, refuse_idle_plan, refuse_idle_text, refuse_without_effect, several, show
from .options_fetch import FETCHED
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(Int4Options, repeat="group_size", backend=True)
def command(
    model: str,
    out: Path,
    options: Int4Options,
    every: dict[str, Int4Options],
    backend: str,
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
) -> None:
    """Write W4A16 experts for vLLM and SGLang, calibrated in the same pass over the checkpoint.

    Example: mmquant int4 --model demo --out ./demo-int4
    """
    refuse_idle_options(options, backend)
    if backend == "llmcompressor":
        if len(every) > 1:
            raise InputError("--backend llmcompressor: makes one variant, expected one --group-size")
        from ..runs.llmc import int4_job, quantize_llmcompressor

        show(quantize_llmcompressor(model, out, int4_job(options), device=device, dry_run=dry_run))
        return
    from ..runs.int4 import check_options, quantize_int4

    check_options(options)
    if len(every) > 1:
        named = {f"g{size}": chosen for size, chosen in every.items()}
        several(model, out, "int4", named, device=device, fetch=fetch, dry_run=dry_run)
        return
    begin(out, dry_run)
    show(quantize_int4(model, out, options, device=device, fetch=fetch, dry_run=dry_run))


def refuse_idle_options(options: Int4Options, backend: str) -> None:
    """InputError for options that would change nothing of what was asked for."""
    if backend == "llmcompressor":
        refuse_without_effect(
            "with --backend llmcompressor", *CALIBRATED, "tp", "max_shard_size", *FETCHED, *PLAN_FIELDS
        )
    else:
        refuse_idle_text(options)
        refuse_idle_plan(options, "attention", "group_size", "eight_bit")
