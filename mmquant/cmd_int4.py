"""mmquant int4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.options import device_option, dry_run_option, model_option, out_option, shard_option
from mmquant.options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from mmquant.convert.hub_store import FetchOptions


@click.command(short_help="INT4 weights (W4A16) for vLLM and SGLang.")
@model_option()
@out_option()
@click.option("--method", type=click.Choice(["rtn"]), default="rtn", show_default=True)
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), default="128", show_default=True)
@click.option("--attention", type=click.Choice(["bf16", "fp8", "int4"]), default="bf16", show_default=True)
@shard_option()
@device_option()
@fetch_options()
@dry_run_option()
def command(
    model: str,
    out: Path,
    method: str,
    group_size: str,
    attention: str,
    limit: int,
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
) -> None:
    """Write W4A16 experts as compressed-tensors pack-quantized.

    Example: mmquant int4 --model demo --method rtn --out ./m27-int4
    """
    from mmquant.convert.int4_variant import Int4Variant
    from mmquant.pipeline import describe, prepare, write_folder

    source = open_model(model, fetch, None if dry_run else out)
    variant = Int4Variant(int(group_size), attention)
    if dry_run:
        click.echo(describe(out, variant.label, prepare(source, variant).bytes))
        return
    click.echo(write_folder(source, variant, out, device=device, limit=limit))
