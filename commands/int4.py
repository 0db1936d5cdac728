"""`mmquant int4`: write an INT4 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from .options_calibration import calibration_options
from .options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command(short_help="INT4 weights (W4A16) for vLLM and SGLang.")
@model_option()
@out_option()
@click.option("--method", type=click.Choice(["gptq", "awq", "rtn"]), default="gptq", show_default=True)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["compressed-tensors", "awq", "gptq"]),
    default="compressed-tensors",
    show_default=True,
)
@click.option("--group-size", type=click.Choice(["32", "64", "128", "-1"]), default="128", show_default=True)
@click.option(
    "--attention", type=click.Choice(["bf16", "fp8", "fp8-channel", "int4"]), default="bf16", show_default=True
)
@click.option("--eight-bit", "eight_bit", metavar="LAYERS", help="Layers kept at 8 bits, for example 0,60-61.")
@click.option(
    "--kv-cache",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="fp8: calibrated scales for an FP8 cache, which vLLM and SGLang then use by themselves; it costs quality.",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "high"]),
    default="default",
    show_default=True,
    help="gptq: fast rounds under diagonal moments, without error feedback; high learns rounding (about ten times as "
    "long). awq: high adds error feedback.",
)
@click.option("--asymmetric", is_flag=True, help="Zero points (always with --format awq).")
@click.option(
    "--tp", type=click.IntRange(1), default=2, show_default=True, help="Tensor parallelism to be loadable at."
)
@backend_option()
@calibration_options()
@shard_option()
@device_option()
@fetch_options()
@fresh_option()
@dry_run_option()
def command(model: str, out: Path, fetch: FetchOptions, dry_run: bool, limit: int, device: str, **options: Any) -> None:
    """Write W4A16 experts for vLLM and SGLang, calibrated in the same pass over the checkpoint.

    Example: mmquant int4 --model demo --out ./m27-int4
    """
    refuse_idle_options(**options)
    if options.pop("backend") == "llmcompressor":
        from ..runs.llmc import int4_job, write_with_llmcompressor

        job = int4_job(options)
        click.echo(write_with_llmcompressor(open_model(model, fetch, None), job, out, device, dry_run))
        return
    from ..runs.folder import describe, prepare
    from ..runs.int4 import Int4Request, check_int4, write_int4

    request = Int4Request.from_options(options, device)
    source = open_model(model, fetch, begin(out, dry_run))
    variant = request.variant(source, out)
    if dry_run:
        size = prepare(source, variant).bytes
        click.echo(describe(out, variant.label, size))
        check_int4(source, variant, request, out, size)
        return
    click.echo(write_int4(source, variant, request, out, limit))


def refuse_idle_options(method: str, backend: str, statistics: Path | None, **_: Any) -> None:
    """InputError for options that would change nothing of what was asked for."""
    text = ("texts", "text_only", "evaluation", "context", "windows")
    calibrated = (*text, "seed", "propagate", "statistics", "effort")
    if backend == "llmcompressor":
        mine = ("tp", "limit", "max_disk", "max_shards", "keep_shards", "transport")
        refuse_without_effect("with --backend llmcompressor", *calibrated, *mine)
    elif method == "rtn":
        refuse_without_effect("with --method rtn, which is not calibrated", *calibrated)
    elif statistics is not None:
        refuse_without_effect("with --statistics, which stands for the text", *text)
