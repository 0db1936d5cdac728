"""`mmquant mlx`: write a folder for mlx_lm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import MlxOptions
from .options import (
    begin,
    dry_run_option,
    fresh_option,
    model_option,
    options_of,
    out_option,
    refuse_idle_plan,
    refuse_idle_text,
    result_json_option,
    show,
)
from .options_fetch import fetch_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@model_option()
@out_option()
@options_of(MlxOptions)
@fetch_options()
@fresh_option()
@dry_run_option()
@result_json_option()
def command(model: str, out: Path, options: MlxOptions, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write mlx_lm's folder, calibrated in the same pass; neither a Mac nor mlx is needed to make it.

    Example: mmquant mlx --model demo --out ./demo-mlx --bits 3 --group-size 128
    """
    refuse_idle_text(options)
    refuse_idle_plan(options, "bits", "group_size", "attention", "embeddings")
    from ..runs.mlx import quantize_mlx

    begin(out, dry_run)
    show(quantize_mlx(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
