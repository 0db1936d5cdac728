"""`mmquant fp8`: write an FP8 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Fp8Options
from .options import begin, refuse_without_effect, show
from .options_fetch import FETCHED
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


PRUNING = ("experts_kept", "experts", "statistics")


@click.command()
@writer_options(Fp8Options, backend=True)
def command(
    model: str, out: Path, options: Fp8Options, backend: str, device: str, fetch: FetchOptions, dry_run: bool
) -> None:
    """Write FP8 weights: block, channel or native.

    block: compressed-tensors 128x128, the release's exact values; channel: a scale per output channel; native: a
    verified copy.

    Example: mmquant fp8 --model demo --out ./demo-fp8
    """
    if backend == "llmcompressor":
        refuse_without_effect("with --backend llmcompressor", "max_shard_size", *PRUNING, *FETCHED)
        from ..runs.llmc import fp8_job, quantize_llmcompressor

        show(quantize_llmcompressor(model, out, fp8_job(options.scheme), device=device, dry_run=dry_run))
        return
    from ..convert.formats.table import choices
    from ..runs.fp8 import quantize_fp8

    if choices("fp8")[options.scheme].nearest is None:  # the release as it is
        refuse_without_effect("with --scheme native, which copies shards as they are", "max_shard_size", *PRUNING)
    begin(out, dry_run)
    show(quantize_fp8(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
