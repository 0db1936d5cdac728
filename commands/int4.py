"""mmquant int4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import device_option, dry_run_option, model_option, out_option, shard_option
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
    help="fp8: calibrated scales for an FP8 cache (SGLang then uses one by itself, vLLM with --kv-cache-dtype fp8).",
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
@dry_run_option()
def command(model: str, out: Path, fetch: FetchOptions, dry_run: bool, limit: int, device: str, **options: Any) -> None:
    """Write W4A16 experts for vLLM and SGLang, calibrated in the same pass over the checkpoint.

    Example: mmquant int4 --model demo --out ./m27-int4
    """
    if options.pop("backend") == "llmcompressor":
        from ..runs.llmc import int4_job, write_with_llmcompressor

        job = int4_job(options)
        click.echo(write_with_llmcompressor(open_model(model, fetch, None), job, out, device, dry_run))
        return
    from ..runs.folder import describe, prepare
    from ..runs.int4 import Int4Request, write_int4

    request = Int4Request.from_options(options, device)
    source = open_model(model, fetch, None if dry_run else out)
    variant = request.variant(source, out)
    if dry_run:
        click.echo(describe(out, variant.label, prepare(source, variant).bytes))
        return
    click.echo(write_int4(source, variant, request, out, limit))
