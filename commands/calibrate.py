"""mmquant calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import FitError, InputError

from .options import check_output, device_option, dry_run_option, json_option, model_option, out_option, parse_size
from .options_fetch import close_model, fetch_options, open_model

if TYPE_CHECKING:
    from ..calibration.statistics.live import PassOptions
    from ..calibration.statistics.run import Needs
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions

FILE = click.Path(path_type=Path)
FULL_BY_DEFAULT = 16 << 30  # full moments are kept by default while they take no more than this on disk


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    if value is None:
        return None
    first, _, last = value.partition(":")
    if not last.isdigit() or first not in ("", "0"):
        raise click.BadParameter(f"{value!r}, expected 0:B (a calibration starts at the first layer)")
    return range(int(last))


@click.command(short_help="Every expert's statistics in one streamed pass.")
@model_option()
@out_option()
@click.option("--text", "texts", multiple=True, help="File, folder or `default`, PATH[=WEIGHT]; repeatable.")
@click.option("--evaluation", multiple=True, help="Text that must not overlap; default: the bundled evaluation text.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--windows", type=click.IntRange(1), default=128, show_default=True, help="Windows at most.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the documents' order.")
@click.option("--moments", type=click.Choice(["full", "diagonal"]), help="What is kept; default: full up to 16 GiB.")
@click.option("--store", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--weighting", type=click.Choice(["router", "uniform"]), default="router", show_default=True)
@click.option("--experts", type=click.Choice(["routed", "all"]), default="routed", show_default=True)
@click.option("--propagate", default="reference", show_default=True, help="`reference`, or a quantized artifact.")
@click.option("--memory", callback=_size, help="Bytes for accumulators, for example 8GB; default: what is free.")
@click.option("--disk", callback=_size, default="64GiB", show_default=True, help="Bytes for hidden states on disk.")
@click.option("--skip-nonfinite", is_flag=True, help="Leave out rows with NaN or infinity instead of stopping.")
@click.option("--imatrix", type=FILE, help="Also write llama.cpp's importance matrix to this .gguf file.")
@click.option("--layers", callback=_layers, metavar="0:B", help="Only the first B layers (development).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of matrix products; default: bf16 on CUDA.")
@device_option()
@fetch_options()
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
    from ..calibration.statistics.run import needs

    if imatrix is not None and imatrix.suffix != ".gguf":
        raise InputError(f"--imatrix {imatrix}: expected a name ending in .gguf")
    check_output("--imatrix", None if dry_run else imatrix)
    source = open_model(model, fetch, None if dry_run else out)
    corpus = make_corpus(source, options)
    chosen = pass_options(source, options)
    if dry_run:
        need = needs(source, corpus, chosen, options["store"])
        plan = {"corpus": corpus.describe(), "moments": chosen.collect.full, "bytes": asdict(need)}
        click.echo(json.dumps(plan, indent=1) if as_json else describe(out, corpus, chosen, options["store"], need))
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


def make_corpus(source: Checkpoint, options: dict[str, Any]) -> Corpus:
    """Read, check and pack the calibration text."""
    import numpy as np

    from ..calibration.text.chat import load_template
    from ..calibration.text.corpus import bundled, pack, read_sets
    from ..calibration.text.overlap import check_disjoint, shingles
    from ..calibration.text.tokenizer import load_tokenizer

    longest = source.geometry.max_context
    context = options["context"] or (512 if longest < 8192 else 2048)
    if context > longest:
        raise InputError(f"--context {context}: the model has at most {longest}")
    template = load_template(source)
    sets = read_sets(list(options["texts"]), template)
    known = np.concatenate([shingles(document.text) for part in sets for document in part.documents])
    held = read_sets(list(options["evaluation"]) or [str(bundled("evaluation"))], template)
    check_disjoint({d.origin: d.text for part in held for d in part.documents}, known)
    return pack(sets, load_tokenizer(source), context, options["windows"], options["seed"])


def pass_options(source: Checkpoint, options: dict[str, Any]) -> PassOptions:
    """The pass's options, with the defaults that depend on the model."""
    import torch

    from ..calibration.statistics.collector import Collect
    from ..calibration.statistics.live import PassOptions, default_dtype
    from ..calibration.statistics.triangles import stored_bytes

    g = source.geometry
    kept = options["moments"]
    if kept is None:
        whole = g.layers * stored_bytes(g, True, options["store"], options["experts"])
        kept = "full" if whole <= FULL_BY_DEFAULT else "diagonal"
    dtype = getattr(torch, options["dtype"]) if options["dtype"] else default_dtype(options["device"])
    return PassOptions(
        collect=Collect(kept == "full", options["weighting"], options["experts"], options["skip_nonfinite"]),
        propagate="reference" if options["propagate"] == "reference" else "quantized",
        device=options["device"],
        dtype=dtype,
        memory=options["memory"],
        disk_limit=options["disk"],
    )


def describe(out: Path, corpus: Corpus, chosen: PassOptions, store: str, need: Needs) -> str:
    """What --dry-run prints."""
    shape = corpus.describe()
    kept = f"full moments in {store}" if chosen.collect.full else "diagonals"
    where = {"device": "in one pass", "host": f"in {need.passes} passes, finished ones in host memory"}
    how = where.get(need.results, f"in {need.passes} passes, finished ones in a temporary file")
    lines = (
        f"{out}: {need.layers} layers, {kept}: {need.statistics:,} bytes",
        f"text: {shape['windows']} windows of {shape['context']} tokens, {shape['windows_by_domain']}",
        f"memory: {need.accumulators:,} bytes of accumulators, {how}; hidden states {need.hidden:,} bytes",
        f"disk while running: {need.hidden_on_disk:,} bytes of hidden states besides the statistics",
    )
    return "\n".join(lines)


def calibrate(source: Checkpoint, corpus: Corpus, chosen: PassOptions, out: Path, options: dict[str, Any]) -> list[Any]:
    """Run the pass into `out` with its report; summaries of all layers."""
    import shutil

    from tqdm import tqdm

    from ..calibration.model.distributed import world
    from ..calibration.statistics.report import summarise
    from ..calibration.statistics.report_html import report
    from ..calibration.statistics.run import calibrate_into, needs
    from ..calibration.statistics.store import open_statistics
    from ..convert.files.atomic import write_whole
    from ..convert.open import open_source

    store, layers = options["store"], options["layers"]
    through = None if chosen.propagate == "reference" else open_source(options["propagate"])
    need = needs(source, corpus, chosen, store)
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    have = sum(p.stat().st_size for p in out.iterdir() if p.is_file()) if out.is_dir() else 0
    free = shutil.disk_usage(there).free + have
    if need.statistics + need.hidden_on_disk > free:
        raise FitError(f"{out}: needs {need.statistics + need.hidden_on_disk} bytes, {free} are free")
    steps = calibrate_into(source, corpus, out, chosen, dtype=store, through=through, layers=layers)
    rank, _ = world()
    total = source.geometry.layers if layers is None else layers.stop
    with tqdm(total=total, desc="calibrate", unit="layer", delay=1, disable=rank != 0) as bar:
        for found in steps:
            bar.update(found.layer + 1 - bar.n)
    if rank != 0:
        return []
    stored = open_statistics(out)
    summaries = [summarise(stored.layer(n, second=False), stored.squares(n)) for n in range(stored.layers)]
    page = report(summaries, corpus.domains, corpus.describe(), f"Calibration of {source.label}")
    write_whole(out / "report.html", page.encode())
    return summaries


def export_imatrix(folder: Path, path: Path) -> None:
    """Write stored statistics as llama.cpp's importance matrix."""
    from ..calibration.statistics.imatrix_export import imatrix_of
    from ..calibration.statistics.store import open_statistics
    from ..convert.gguf.imatrix import write_imatrix

    write_imatrix(path, imatrix_of(open_statistics(folder)))
