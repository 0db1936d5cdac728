"""`mmquant bf16`: write a BF16 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Bf16Options
from .options import begin, dry_run_option, fresh_option, model_option, options_of, out_option, result_json_option, show
from .options_fetch import fetch_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@model_option()
@out_option()
@options_of(Bf16Options)
@fetch_options()
@fresh_option()
@dry_run_option()
@result_json_option()
def command(model: str, out: Path, options: Bf16Options, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write the model in BF16, what fine-tuning starts from.

    Every FP8 code times its scale, rounded once to bfloat16; what is not FP8 stays as it is stored.

    Example: mmquant bf16 --model demo --out ./demo-bf16
    """
    from ..runs.bf16 import dequantize_bf16

    begin(out, dry_run)
    show(dequantize_bf16(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
