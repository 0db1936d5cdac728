"""Collect every layer's statistics into a folder (`mmquant calibrate`); a killed run continues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mmquant.errors import InputError

from ...convert.checkpoints.checkpoint import Checkpoint
from ...convert.files.atomic import making
from ...convert.files.lock import hold
from ...convert.source import Source, read_layer
from ..model.distributed import barrier, rank_share, world
from ..model.stream import Stream, forget
from ..text.corpus import Corpus
from .layer import LayerStatistics
from .layer_pass import calibrate_layer, sum_over_ranks
from .live import PassOptions, moment_plan
from .store import StatisticsWriter, identity_of
from .triangles import stored_bytes


@dataclass(frozen=True)
class Needs:
    """What a run takes: bytes on disk (statistics, hidden states at their peak) and in memory, forwards of a layer."""

    layers: int
    statistics: int
    hidden: int
    hidden_on_disk: int
    accumulators: int
    passes: int
    results: str


def needs(source: Checkpoint, corpus: Corpus, options: PassOptions, dtype: str) -> Needs:
    """For --dry-run; nothing is read but headers. Raises ValueError when the memory limit is too small."""
    g = source.geometry
    plan = moment_plan(source, options, corpus.tokens.numel())
    hidden = 4 * corpus.tokens.numel() * g.hidden
    layer = stored_bytes(g, options.collect.full, dtype, options.collect.experts)
    return Needs(
        layers=g.layers,
        statistics=g.layers * layer,
        hidden=hidden,
        hidden_on_disk=2 * hidden if 2 * hidden <= options.disk_limit else 0,
        accumulators=plan.bytes,
        passes=plan.passes,
        results=plan.results,
    )


def writer_of(
    source: Checkpoint, corpus: Corpus, folder: Path, options: PassOptions, dtype: str, through: Source | None
) -> StatisticsWriter:
    """The writer of a corpus's statistics in `folder`. InputError when that holds something else."""
    identity = identity_of(
        source.fingerprint,
        source.geometry,
        corpus.describe(),
        options.collect,
        propagate=through.fingerprint if through is not None else "reference",
        dtype=str(options.dtype).removeprefix("torch."),
    )
    return StatisticsWriter(folder, identity, source.label, dtype)


def check_calibration(source: Checkpoint, corpus: Corpus, options: PassOptions, folder: Path, dtype: str) -> None:
    """InputError when `folder` holds something else than (a part of) these statistics; nothing is written."""
    if options.propagate == "reference":
        writer_of(source, corpus, folder, options, dtype, None)


def calibrate_into(
    source: Checkpoint,
    corpus: Corpus,
    folder: Path,
    options: PassOptions,
    *,
    dtype: str = "float32",
    through: Source | None = None,
    layers: range | None = None,
) -> Iterator[LayerStatistics]:
    """Write the statistics of every layer that is not written yet, yielding each when it is safe on disk.

    One process (of rank 0) holds the folder meanwhile.

    through: the next layer sees the output of this model's layers (a quantized artifact of the same model) instead of
    the reference's: `--propagate quantized`. layers: stop early (development).
    """
    rank, size = world()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder or nothing")
    own = rank_share(corpus.tokens.shape[0], rank, size)
    plan = moment_plan(source, options, len(own) * corpus.tokens.shape[1])  # before there is a folder
    with making(folder), hold(folder) if rank == 0 else nullcontext():
        writer = writer_of(source, corpus, folder, options, dtype, through)
        last = source.geometry.layers if layers is None else layers.stop
        barrier()  # every rank has read the manifest before rank 0 changes it
        if writer.done >= last:
            if rank == 0 and last == source.geometry.layers:
                forget(folder)
            return
        writer.commit()  # the folder is ours from here on, whatever a kill leaves in it
        stream = Stream(
            source,
            corpus.tokens,
            device=options.device,
            dtype=options.dtype,
            batch=options.batch,
            folder=folder,
            ram_limit=options.ram_limit,
            disk_limit=options.disk_limit,
        )
        stream.start(writer.done, replay=through is None)
        for layer in range(writer.done, last):
            found = sum_over_ranks(
                calibrate_layer(
                    stream,
                    stream.read_layer(layer),
                    corpus.domain[own.start : own.stop],
                    len(corpus.domains),
                    options.collect,
                    plan,
                    first_window=own.start,
                    advance=through is None,
                    scratch=folder,
                )
            )
            if through is not None:
                stream.advance(read_layer(through, layer, stream.device, stream.dtype))
            writer.write(found)
            stream.save()
            stream.settle()
            barrier()  # every rank's checkpoint is safe before the layer counts
            writer.commit()
            barrier()
            stream.keep_from(layer)
            yield found
        if last == source.geometry.layers:
            stream.keep_from(last + 1)
        stream.settle()
