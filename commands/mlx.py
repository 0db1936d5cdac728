"""`mmquant mlx`: write a folder for mlx_lm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import MlxOptions
from .options import begin, refuse_idle_plan, refuse_idle_text, show
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(MlxOptions)
def command(model: str, out: Path, options: MlxOptions, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write mlx_lm's folder, calibrated in the same pass; neither a Mac nor mlx is needed to make it.

    Example: mmquant mlx --model demo --out ./demo-mlx --bits 3 --group-size 128
    """
    refuse_idle_text(options)
    refuse_idle_plan(options, "bits", "group_size", "attention", "embeddings")
    from ..runs.mlx import quantize_mlx

    begin(out, dry_run)
    show(quantize_mlx(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
