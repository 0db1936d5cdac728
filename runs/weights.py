"""Write folders of few-bit weights: INT4, NVFP4, MXFP4, MLX. What each of them chooses is in its own module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmquant.errors import InputError
from mmquant.monitor import Monitor, message, watching

from ..calibration.folder.mlx import CalibratedMlx
from ..calibration.folder.options import LayerOptions
from ..calibration.folder.variant import CalibratedWeights
from ..calibration.statistics.live import moment_plan
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.fitting.requires import notes
from ..convert.folder.mlx import MlxVariant
from ..convert.folder.weights import ATTENTION_FP8, WeightsVariant
from ..convert.formats.table import choices
from ..quantize.integer.panel import Grid
from .calibrate import make_provider, pass_of
from .corpus import at_effort, check_texts, tokens_at_most
from .engine import run_jobs
from .folder import FolderJob
from .folder_steps import prepare
from .made import words_of
from .models import Model, choose_device, opened
from .needs import needs_of
from .options import CalibratedOptions, WeightsOptions
from .passes import Passes
from .place import check_place
from .plan_first import with_plan
from .results import Quantized, planned, written

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

STREAMS = ".mmquant-streams"  # what a killed run of high effort continues from
Options = TypeVar("Options", bound=CalibratedOptions)
Variant = WeightsVariant | MlxVariant
CALIBRATED = (CalibratedWeights, CalibratedMlx)


def quantize_weights(
    model: Model,
    out: str | Path,
    options: Options,
    command: str,
    variant_of: Callable[[Checkpoint, Options, Path], Variant],
    *,
    device: str | None,
    fetch: FetchOptions | None,
    dry_run: bool,
    monitor: Monitor | None,
) -> Quantized:
    """Write what `variant_of` of a command makes of the options, for a source and a folder; see `quantize_int4`."""
    out, place = Path(out), choose_device(device)
    with watching(monitor), opened(model, fetch, None if dry_run else out) as source:
        options = with_plan(source, options, out, place, dry_run, command)
        variant = variant_of(source, options, out)
        size = prepare(source, variant).bytes
        if dry_run:
            needs = needs_of(source, out, size, place, rate_of(options))
            return planned(out, variant.label, needs, lambda: check_weights(source, variant, options, place, out, size))
        job = make_job(source, options, out, Passes(source, place), variant)
        run_jobs([job])
        return written(job.path, variant.label, size)


def rate_of(options: CalibratedOptions) -> str:
    """What bench/RESULTS.md calls the run; nothing for what it has no figure of."""
    return options.method if options.effort == "default" and options.statistics is None else ""


def check_mixture(command: str, options: WeightsOptions) -> None:
    """InputError for FP8 attention or an FP8 cache beside a format that holds nothing beside it."""
    rows = choices(command)
    if rows[options.format].mixes:
        return
    mixing = " or ".join(word for word, row in rows.items() if row.mixes)
    if options.attention in ATTENTION_FP8:
        said = f"--format {options.format} --attention {options.attention}"
        raise InputError(f"{said}: only {mixing} holds FP8 beside {command.upper()}")
    if options.kv_cache == "fp8":
        raise InputError(f"--kv-cache fp8 --format {options.format}: expected {mixing}")


def say_notes(variant: Variant, source: Checkpoint) -> None:
    """What is known to go wrong with such an artifact, before it is written."""
    for note in notes(variant.run(), source.geometry):
        message(note)


def weights_variant(
    source: Checkpoint, options: WeightsOptions, out: Path, shape: dict[str, Any], grid: Grid
) -> WeightsVariant:
    """The folder to write, by the fields of its variant in `shape`: to nearest, or calibrated on the grid."""
    nearest = WeightsVariant(**shape)
    say_notes(nearest, source)
    if options.method == "rtn":
        return nearest
    chosen = LayerOptions(
        method=options.method,
        effort=options.effort,
        grid=grid,
        attention=options.attention == nearest.command,
        seed=options.seed,
    )
    streams = out / STREAMS if chosen.sign_rounded else None
    return CalibratedWeights(**shape, options=chosen, report=message, streams=streams)


def check_weights(
    source: Checkpoint, variant: Variant, options: CalibratedOptions, device: str, out: Path, size: int
) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, {**variant.run(), "source": source.fingerprint})
    if isinstance(variant, CALIBRATED) and options.statistics is None:
        check_texts(options)
        chosen = pass_of(options, device, variant.options.sign_rounded, variant.options.full)
        moment_plan(source, chosen, tokens_at_most(source, at_effort(options)))


def make_job(source: Checkpoint, options: CalibratedOptions, out: Path, passes: Passes, variant: Variant) -> FolderJob:
    """The artifact as a job of `passes`' run; its text is read here. What it would continue from goes at the end."""
    provider = None
    if isinstance(variant, CALIBRATED):
        sign_rounded, full = variant.options.sign_rounded, variant.options.full
        provider = make_provider(source, options, passes, out / STREAMS, hidden=sign_rounded, full=full)
    sign_rounded = isinstance(variant, CALIBRATED) and variant.options.sign_rounded
    job = FolderJob(
        source,
        variant,
        out,
        device=passes.device,
        limit=options.max_shard_size,
        provider=provider,
        behind=int(sign_rounded),  # the reference stream reads the layer before once more
        streams=out / STREAMS,
    )
    job.made = words_of(variant.command, options)
    return job
