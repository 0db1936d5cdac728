"""Calibrate: build the corpus, then store statistics or hand them to a quantizer in a live pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, InputError, MmquantError
from mmquant.monitor import Monitor, phase, watching

from .corpus import at_effort, make_corpus, say_if_short
from .models import Model, choose_device, close_model, opened
from .options import CalibratedOptions, CalibrateOptions
from .output import check_output
from .results import Result

if TYPE_CHECKING:
    from ..calibration.statistics.live import PassOptions
    from ..calibration.statistics.provider import Provider
    from ..calibration.statistics.report import LayerSummary
    from ..calibration.statistics.run import Needs
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions
    from .needs import Needs as RunNeeds
    from .passes import Passes

FULL_BY_DEFAULT = 16 << 30  # full moments are kept by default while they take no more than this on disk


@dataclass(frozen=True)
class Calibration(Result):
    """Stored statistics: `layers` holds one summary a layer, `corpus` says what text they come from."""

    path: Path
    corpus: dict[str, Any]
    layers: list[LayerSummary]

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        from ..calibration.statistics.report import as_json

        return as_json(self.layers, self.corpus)

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer, what is a single number of it."""
        found = [asdict(layer) for layer in self.layers]
        return [{k: v for k, v in row.items() if isinstance(v, int | float | str)} for row in found]

    def lines(self) -> list[str]:
        """The same for people."""
        from ..calibration.statistics.report import findings, table

        done = f"{self.path}: {len(self.layers)} layers, report in {self.path / 'report.html'}"
        return [*table(self.layers), *findings(self.layers), done]


@dataclass(frozen=True)
class CalibrationPlan(Result):
    """What a calibration would need, of a dry run; needs: as of every writer; refusal: what it would stop at."""

    corpus: dict[str, Any]
    full: bool
    need: Needs
    text: str
    refusal: MmquantError | None
    needs: RunNeeds

    def to_dict(self) -> dict[str, Any]:
        """The document that the command prints with --json."""
        return {"corpus": self.corpus, "moments": self.full, "bytes": asdict(self.need)} | {
            "needs": self.needs.to_dict(),
            "refusal": str(self.refusal) if self.refusal else None,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row each, for tables."""
        return [asdict(self.need)]

    def lines(self) -> list[str]:
        """The same for people."""
        return [self.text, *self.needs.lines("no" if self.refusal else "yes")]


def calibrate(
    model: Model,
    out: str | Path,
    options: CalibrateOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    monitor: Monitor | None = None,
) -> Calibration | None:
    """Run text through the model and store every expert's statistics in `out`; an unfinished run is continued.

    The result goes into `statistics` of Int4Options and GgufOptions. None on every rank of torchrun but the first.

    Raises InputError for text or a folder that will not do, FitError when memory or disk is too small.
    """
    chosen, out = options or CalibrateOptions(), Path(out)
    check_output("--imatrix", chosen.imatrix)
    with watching(monitor), opened(model, fetch, out) as source:
        corpus = make_corpus(source, chosen)
        layers = collect(source, corpus, pass_options(source, chosen, choose_device(device)), out, chosen)
        if isinstance(model, str | Path):
            close_model(source, finished=True)
        if not layers:
            return None
        if chosen.imatrix is not None:
            export_imatrix(out, chosen.imatrix)
        return Calibration(out, corpus.describe(), layers)


def plan_calibration(
    model: Model,
    out: str | Path,
    options: CalibrateOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
) -> CalibrationPlan:
    """What `calibrate` would need; nothing is written."""
    from ..calibration.statistics.run import check_calibration, needs

    chosen, out = options or CalibrateOptions(), Path(out)
    with opened(model, fetch) as source:
        corpus = make_corpus(source, chosen)
        passes = pass_options(source, chosen, place := choose_device(device))
        need, refusal = needs(source, corpus, passes, chosen.store), None
        whole = calibration_needs(source, out, need, place)
        try:
            check_calibration(source, corpus, passes, out, chosen.store)
            check_room(out, need)
        except MmquantError as error:
            refusal = error if isinstance(error, FitError) else FitError(str(error))
        text = describe(out, corpus, passes, chosen.store, need)
        return CalibrationPlan(corpus.describe(), passes.collect.full, need, text, refusal, whole)


def calibration_needs(source: Checkpoint, out: Path, need: Needs, device: str) -> RunNeeds:
    """The same in the words of every writer: accumulators and hidden states lie beside a layer's weights."""
    from .needs import needs_of

    found = needs_of(source, out, need.statistics, device)
    more = need.accumulators + (0 if need.hidden_on_disk else need.hidden)
    return replace(
        found,
        disk=found.disk + need.hidden_on_disk,
        ram=found.ram + (0 if found.gpu else more),
        gpu=found.gpu + more if found.gpu else 0,
    )


def pass_of(options: CalibratedOptions, device: str, hidden: bool, full: bool) -> PassOptions:
    """How a quantizer's own pass is computed (`make_provider`)."""
    from ..calibration.statistics.collect import Collect
    from ..calibration.statistics.live import PassOptions, default_dtype

    propagate = options.propagate or ("quantized" if hidden else "reference")
    return PassOptions(Collect(full), propagate, device, default_dtype(device), hold=full and not hidden)


def pass_options(source: Checkpoint, options: CalibrateOptions, device: str) -> PassOptions:
    """The pass's options, with the defaults that depend on the model."""
    import torch

    from ..calibration.statistics.collect import Collect
    from ..calibration.statistics.live import PassOptions, default_dtype
    from ..calibration.statistics.triangles import stored_bytes

    g = source.geometry
    kept = options.moments
    if kept is None:
        whole = g.layers * stored_bytes(g, True, options.store, options.experts)
        kept = "full" if whole <= FULL_BY_DEFAULT else "diagonal"
    dtype = getattr(torch, options.dtype) if options.dtype else default_dtype(device)
    return PassOptions(
        collect=Collect(kept == "full", options.weighting, options.experts, options.skip_nonfinite),
        propagate="reference" if options.propagate == "reference" else "quantized",
        device=device,
        dtype=dtype,
        memory=options.memory,
        disk_limit=options.disk,
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


def check_room(out: Path, need: Needs) -> None:
    """FitError when the disk of `out` does not hold the statistics and the hidden states."""
    import shutil

    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    have = sum(p.stat().st_size for p in out.iterdir() if p.is_file()) if out.is_dir() else 0
    free, needed = shutil.disk_usage(there).free, need.statistics + need.hidden_on_disk - have
    if needed > free:
        raise FitError(f"{out}: {needed:,} bytes are needed, the disk has {free:,} free")


def collect(
    source: Checkpoint, corpus: Corpus, chosen: PassOptions, out: Path, options: CalibrateOptions
) -> list[LayerSummary]:
    """Run the pass into `out` with its report; summaries of all layers."""
    from ..calibration.model.distributed import world
    from ..calibration.statistics.run import calibrate_into, needs
    from ..convert.open import open_source

    store, layers = options.store, options.layers
    if layers is not None and layers.stop > source.geometry.layers:
        raise InputError(f"--layers 0:{layers.stop}: the model has {source.geometry.layers} layers")
    through = None if chosen.propagate == "reference" else open_source(options.propagate)
    check_room(out, needs(source, corpus, chosen, store))
    steps = calibrate_into(source, corpus, out, chosen, dtype=store, through=through, layers=layers)
    rank, _ = world()
    total = source.geometry.layers if layers is None else layers.stop
    with phase("calibrate", total, "layer") as bar:
        done = 0
        for found in steps:
            bar.advance(found.layer + 1 - done)
            done = found.layer + 1
    if rank != 0:
        return []
    return write_report(out, corpus, source)


def write_report(out: Path, corpus: Corpus, source: Checkpoint) -> list[LayerSummary]:
    """report.html of finished statistics; summaries of all layers."""
    from ..calibration.statistics.report import summarise
    from ..calibration.statistics.store import open_statistics
    from .reports.calibration import report
    from .reports.page import write

    stored = open_statistics(out)
    summaries = [summarise(stored.layer(n, second=False), stored.squares(n)) for n in range(stored.layers)]
    page = report(summaries, corpus.domains, corpus.describe(), f"Calibration of {source.label}")
    write(out / "report.html", page)
    return summaries


def export_imatrix(folder: Path, path: Path) -> None:
    """Write stored statistics as llama.cpp's importance matrix."""
    from ..calibration.statistics.imatrix_export import imatrix_of
    from ..calibration.statistics.store import open_statistics
    from ..convert.gguf.imatrix import write_imatrix

    write_imatrix(path, imatrix_of(open_statistics(folder)))


def make_provider(
    source: Checkpoint, options: CalibratedOptions, passes: Passes, folder: Path, hidden: bool, full: bool = True
) -> Provider:
    """A live pass over the calibration text, or the stored statistics of --statistics.

    folder keeps the stream of a quantized pass between layers, so that a killed run continues.
    hidden: the quantizer needs the tokens themselves, which stored statistics cannot give (InputError).
    full: it needs second moments; otherwise diagonals are collected, and stored ones will do.
    """
    from ..calibration.statistics.live import LivePass, StoredPass

    chosen = pass_of(options, passes.device, hidden, full)
    if options.statistics is None:
        corpus = passes.corpus(at_effort(options))
        say_if_short(options, corpus)
        if hidden or chosen.propagate == "quantized":
            return LivePass(source, corpus, chosen, hidden=hidden, folder=folder)
        return passes.reference_pass(corpus, chosen, folder)
    from ..calibration.statistics.store import open_statistics

    stored = open_statistics(options.statistics)
    if full and not stored.full:
        raise InputError(f"{options.statistics}: holds diagonals, expected second moments (calibrate --moments full)")
    return StoredPass(source, stored, chosen)
