"""`mmquant bf16`: write a BF16 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Bf16Options
from .options import begin, show
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(Bf16Options)
def command(model: str, out: Path, options: Bf16Options, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write the model in BF16, what fine-tuning starts from.

    Every FP8 code times its scale, rounded once to bfloat16; what is not FP8 stays as it is stored.

    Example: mmquant bf16 --model demo --out ./demo-bf16
    """
    from ..runs.bf16 import dequantize_bf16

    begin(out, dry_run)
    show(dequantize_bf16(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
