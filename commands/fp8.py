"""`mmquant fp8`: write an FP8 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Fp8Options
from .options import (
    begin,
    dry_run_option,
    fresh_option,
    model_option,
    options_of,
    out_option,
    refuse_without_effect,
    result_json_option,
    show,
)
from .options_backend import backend_option
from .options_fetch import FETCHED, fetch_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


PRUNING = ("experts_kept", "experts", "statistics")


@click.command()
@model_option()
@out_option()
@options_of(Fp8Options)
@backend_option()
@fetch_options()
@fresh_option()
@dry_run_option()
@result_json_option()
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
