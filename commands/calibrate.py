"""`mmquant calibrate`: collect and store every expert's statistics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import InputError

from ..runs.sizes import check_output
from .options import (
    SEED,
    begin,
    device_option,
    dry_run_option,
    fresh_option,
    json_option,
    model_option,
    out_option,
    size,
)
from .options_fetch import fetch_options, open_model

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

FILE = click.Path(path_type=Path)


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    match = re.fullmatch("0?:([0-9]{1,4})", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r}, expected 0:B (a calibration starts at the first layer)")
    return range(int(match[1]))


@click.command(short_help="Every expert's statistics in one streamed pass.")
@model_option()
@out_option()
@click.option("--text", "texts", multiple=True, help="File, folder or `default`, PATH[=WEIGHT]; repeatable.")
@click.option("--evaluation", multiple=True, help="Text that must not overlap; default: the bundled evaluation text.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows at most.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the documents' order.")
@click.option("--moments", type=click.Choice(["full", "diagonal"]), help="What is kept; default: full up to 16 GiB.")
@click.option("--store", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--weighting", type=click.Choice(["router", "uniform"]), default="router", show_default=True)
@click.option("--experts", type=click.Choice(["routed", "all"]), default="routed", show_default=True)
@click.option("--propagate", default="reference", show_default=True, help="`reference`, or a quantized artifact.")
@click.option("--memory", callback=size, help="Bytes for accumulators, for example 8GB; default: what is free.")
@click.option("--disk", callback=size, default="64GiB", show_default=True, help="Bytes for hidden states on disk.")
@click.option("--skip-nonfinite", is_flag=True, help="Leave out rows with NaN or infinity instead of stopping.")
@click.option("--imatrix", type=FILE, help="Also write llama.cpp's importance matrix to this .gguf file.")
@click.option("--layers", callback=_layers, metavar="0:B", help="Only the first B layers (development).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of matrix products; default: bf16 on CUDA.")
@device_option()
@fetch_options()
@fresh_option()
@dry_run_option()
@json_option()
def command(
    model: str, out: Path, imatrix: Path | None, fetch: FetchOptions, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Run calibration text through the model and keep, per expert, what every quantizer needs.

    Killed and run again it continues with the layer it was in; under torchrun the windows are split over the ranks.

    Example: mmquant calibrate --model demo --out ./statistics --imatrix imatrix.gguf
    """
    import json
    from dataclasses import asdict

    from ..calibration.model.distributed import leave, world
    from ..calibration.statistics.report import as_json as to_json
    from ..calibration.statistics.report import findings, table
    from ..calibration.statistics.run import check_calibration, needs
    from ..runs.calibrate import (
        calibrate,
        check_room,
        describe,
        export_imatrix,
        make_corpus,
        pass_options,
    )
    from ..runs.models import close_model

    if imatrix is not None and imatrix.suffix != ".gguf":
        raise InputError(f"--imatrix {imatrix}: expected a name ending in .gguf")
    check_output("--imatrix", None if dry_run else imatrix)
    source = open_model(model, fetch, begin(out, dry_run))
    corpus = make_corpus(source, options)
    chosen = pass_options(source, options)
    if dry_run:
        need = needs(source, corpus, chosen, options["store"])
        plan = {"corpus": corpus.describe(), "moments": chosen.collect.full, "bytes": asdict(need)}
        click.echo(json.dumps(plan, indent=1) if as_json else describe(out, corpus, chosen, options["store"], need))
        check_calibration(source, corpus, chosen, out, options["store"])
        check_room(out, need)
        return
    summaries = calibrate(source, corpus, chosen, out, options)
    close_model(source, finished=True)
    if world()[0] == 0:
        if imatrix is not None:
            export_imatrix(out, imatrix)
        described = corpus.describe()
        if as_json:
            click.echo(json.dumps(to_json(summaries, described), indent=1, allow_nan=False))
        else:
            click.echo(table(summaries))
            for text in findings(summaries):
                click.echo(text)
            click.echo(f"{out}: {len(summaries)} layers, report in {out / 'report.html'}")
    leave()
