"""mmquant gguf."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.options import device_option, dry_run_option, model_option, out_option, parse_size
from mmquant.options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from mmquant.convert.hub_store import FetchOptions


@click.command(short_help="GGUF for llama.cpp.")
@model_option()
@out_option()
@click.option(
    "--type", "kind", default="Q4_K_M", show_default=True, help="Any mix of llama-quantize: Q4_K_M, IQ3_XXS ..."
)
@click.option(
    "--tensor-type", "overrides", multiple=True, help="REGEX=TYPE, as in llama-quantize; the first match wins."
)
@click.option("--name", default=None, help="Name of the file without .gguf; default: model and type.")
@click.option("--max-part-size", default="48GB", show_default=True, help="Largest file; more become -00001-of-0000N.")
@device_option()
@fetch_options()
@dry_run_option()
def command(
    model: str,
    out: Path,
    kind: str,
    overrides: tuple[str, ...],
    name: str | None,
    max_part_size: str,
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
) -> None:
    """Write a GGUF file that stock llama.cpp loads.

    Example: mmquant gguf --model demo --type Q8_0 --out ./m27-gguf
    """
    from mmquant.convert.gguf_mix import find_mix, parse_overrides
    from mmquant.convert.gguf_variant import GgufVariant
    from mmquant.gguf_run import write_gguf
    from mmquant.pipeline import describe

    mix = find_mix(kind)
    changed = parse_overrides(overrides)
    source = open_model(model, fetch, None if dry_run else out)
    stem = name or f"{model_stem(model)}-{mix.name}"
    variant = GgufVariant(mix, stem, False, changed, part_bytes=parse_size(max_part_size))
    if dry_run:
        click.echo(describe(out, variant.label, sum(part.bytes for part in variant.parts(source, None))))
        return
    click.echo(write_gguf(source, variant, out, device=device))


def model_stem(model: str) -> str:
    """The model's name in a file name: the last part of a hub name or path."""
    bare = model.removeprefix("hf:").removeprefix("ms:").split("@")[0]
    return Path(bare).resolve().name if bare in (".", "..") else bare.rstrip("/").rsplit("/", 1)[-1]
