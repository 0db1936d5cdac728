"""`mmquant fp8`: write an FP8 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import (
    begin,
    device_option,
    dry_run_option,
    fresh_option,
    model_option,
    out_option,
    refuse_without_effect,
    shard_option,
)
from .options_backend import backend_option
from .options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command(short_help="FP8 for vLLM and SGLang.")
@model_option()
@out_option()
@click.option("--scheme", type=click.Choice(["block", "channel", "native"]), default="block", show_default=True)
@backend_option()
@shard_option()
@device_option()
@fetch_options()
@fresh_option()
@dry_run_option()
def command(
    model: str, out: Path, scheme: str, backend: str, limit: int, device: str, fetch: FetchOptions, dry_run: bool
) -> None:
    """Write FP8: block (compressed-tensors 128x128, the release's exact values), channel (a scale per output channel)
    or native (verified copy).

    Example: mmquant fp8 --model demo --out ./m27-fp8
    """
    if backend == "llmcompressor":
        fetched = ("max_disk", "max_shards", "keep_shards", "transport")
        refuse_without_effect("with --backend llmcompressor", "limit", *fetched)
        from ..runs.llmc import fp8_job, write_with_llmcompressor

        click.echo(write_with_llmcompressor(open_model(model, fetch, None), fp8_job(scheme), out, device, dry_run))
        return
    from ..convert.folder.fp8 import Fp8Variant
    from ..convert.folder.native_copy import check_native
    from ..convert.formats.table import choices
    from ..runs.folder import check_place, describe, prepare, write_folder, write_native

    copied = choices("fp8")[scheme].nearest is None  # the release as it is
    if copied:
        refuse_without_effect("with --scheme native, which copies shards as they are", "limit")
    source = open_model(model, fetch, begin(out, dry_run))
    if copied:
        check_native(source)
        if dry_run:
            click.echo(describe(out, "FP8-native", source.bytes))
            check_place(out, source.bytes, {"command": "fp8", "scheme": scheme, "source": source.fingerprint})
            return
        click.echo(write_native(source, out))
        return
    variant = Fp8Variant(scheme)
    if dry_run:
        size = prepare(source, variant).bytes
        click.echo(describe(out, variant.label, size))
        check_place(out, size, {**variant.run(), "source": source.fingerprint, "shard_limit": limit})
        return
    click.echo(write_folder(source, variant, out, device=device, limit=limit))
