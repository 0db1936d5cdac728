"""`mmquant mxfp4`: write an MXFP4 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Mxfp4Options
from .options import begin, refuse_idle_plan, refuse_idle_text, show
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(Mxfp4Options)
def command(model: str, out: Path, options: Mxfp4Options, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write MXFP4 experts (E2M1, a power of two per 32 inputs) for vLLM and SGLang, calibrated in the same pass.

    Example: mmquant mxfp4 --model demo --out ./demo-mxfp4
    """
    refuse_idle_text(options)
    refuse_idle_plan(options, "attention")
    from ..runs.fp4 import quantize_mxfp4

    begin(out, dry_run)
    show(quantize_mxfp4(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
