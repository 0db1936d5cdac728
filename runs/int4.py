"""Write INT4 folders for vLLM and SGLang."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import Monitor, current, watching

from ..calibration.int4.layer import Int4Options as LayerOptions
from ..calibration.int4.variant import CalibratedInt4
from ..calibration.statistics.live import moment_plan
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.int4 import ATTENTION_FP8, Int4Variant, check_groups
from ..convert.formats.table import choices
from ..convert.requires import notes
from ..quantize.integer.gptq import GptqGrid
from .calibrate import make_provider, pass_of, tokens_at_most
from .folder import check_place, prepare, write_folder
from .models import Model, choose_device, opened
from .options import Int4Options
from .results import Quantized, planned, written

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

STREAMS = ".mmquant-streams"  # what a killed run of high effort continues from


def quantize_int4(
    model: Model,
    out: str | Path,
    options: Int4Options | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write INT4 weights (W4A16) into the folder `out`, calibrated in the same pass.

    For AWQ's own format give `Int4Options(method="awq", format="awq")`.

    A finished folder of the same run is left alone, an unfinished one continued. Arguments as of `quantize_fp8`.

    Raises InputError when model, text or `out` is not what is needed, FitError when memory or disk is too small.
    """
    chosen, out, place = options or Int4Options(), Path(out), choose_device(device)
    check_options(chosen)
    with watching(monitor), opened(model, fetch, None if dry_run else out) as source:
        variant = variant_of(source, chosen, out)
        size = prepare(source, variant).bytes
        if dry_run:
            return planned(out, variant.label, size, lambda: check_int4(source, variant, chosen, place, out, size))
        return written(write_int4(source, variant, chosen, place, out), variant.label, size)


def check_options(options: Int4Options) -> None:
    """InputError for what the format cannot hold."""
    layers_of(options.eight_bit)
    symmetric = symmetric_of(options)
    check_mixture(options)
    if options.method == "gptq" and options.effort == "high" and not symmetric:
        raise InputError("--effort high: learned rounding is for symmetric grids, leave --asymmetric out")


def symmetric_of(options: Int4Options) -> bool:
    """Whether the grid has no zero points: the format's habit unless asked otherwise. InputError if it has no such."""
    row = choices("int4")[options.format]
    if options.asymmetric and False not in row.symmetric:
        other = " or ".join(word for word, row in choices("int4").items() if False in row.symmetric)
        said = f"--format {options.format} --asymmetric"
        raise InputError(f"{said}: engines read symmetric {options.format} only; use --format {other}")
    return row.symmetric[0] and not options.asymmetric


def check_mixture(options: Int4Options) -> None:
    """InputError for FP8 attention or an FP8 cache beside integers of a format that holds nothing beside them."""
    if choices("int4")[options.format].mixes:
        return
    mixing = " or ".join(word for word, row in choices("int4").items() if row.mixes)
    if options.attention in ATTENTION_FP8:
        said = f"--format {options.format} --attention {options.attention}"
        raise InputError(f"{said}: only {mixing} holds FP8 beside INT4")
    if options.kv_cache == "fp8":
        raise InputError(f"--kv-cache fp8 --format {options.format}: expected {mixing}")


def variant_of(source: Checkpoint, options: Int4Options, out: Path) -> Int4Variant:
    """The artifact to write. InputError when its groups do not fit the model at the tensor parallelism."""
    check_groups(source.geometry, options.group_size, options.tp, options.attention)
    for note in notes({"command": "int4", "group_size": options.group_size}, source.geometry):
        current().message(note)
    shape: dict[str, Any] = {"group_size": options.group_size, "attention": options.attention}
    shape |= {"layout": options.format, "eight_bit": layers_of(options.eight_bit), "kv_cache": options.kv_cache}
    symmetric = symmetric_of(options)
    shape["symmetric"] = symmetric
    if options.method == "rtn":
        return Int4Variant(**shape)
    chosen = LayerOptions(
        method=options.method,
        effort=options.effort,
        grid=GptqGrid(4, options.group_size, symmetric),
        attention=options.attention,
        seed=options.seed,
    )
    streams = out / STREAMS if chosen.learned else None
    return CalibratedInt4(**shape, options=chosen, report=current().message, streams=streams)


def layers_of(text: str | None) -> tuple[int, ...]:
    """0,60-61 -> (0, 60, 61). InputError for anything else, and for layers that no model has."""
    found: set[int] = set()
    for part in (text or "").split(",") if text else []:
        first, _, last = part.partition("-")
        if not all(re.fullmatch("[0-9]{1,4}", end.strip()) for end in (first, last or first)):
            raise InputError(f"--eight-bit {text!r}, expected layers such as 0,60-61")
        if int(last or first) < int(first):
            raise InputError(f"--eight-bit {text!r}: {part} runs backwards, expected layers such as 0,60-61")
        found |= set(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))


def check_int4(
    source: Checkpoint, variant: Int4Variant, options: Int4Options, device: str, out: Path, size: int
) -> None:
    """What a real run would refuse after a dry run: an occupied place, a disk or a memory that is too small."""
    check_place(out, size, {**variant.run(), "source": source.fingerprint})
    if isinstance(variant, CalibratedInt4) and options.statistics is None:
        chosen = pass_of(options, device, variant.options.learned, variant.options.full)
        moment_plan(source, chosen, tokens_at_most(source, options))


def write_int4(source: Checkpoint, variant: Int4Variant, options: Int4Options, device: str, out: Path) -> Path:
    """Write the folder; what a killed run would have continued from goes with it."""
    provider = None
    if isinstance(variant, CalibratedInt4):
        provider = make_provider(
            source,
            options,
            device,
            out / STREAMS,
            hidden=variant.options.learned,
            full=variant.options.full,
        )
    if isinstance(variant, CalibratedInt4) and variant.options.learned:
        source.schedule.behind = 1  # the reference stream reads the layer before once more
    done = write_folder(source, variant, out, device=device, limit=options.max_shard_size, provider=provider)
    shutil.rmtree(out / STREAMS, ignore_errors=True)
    return done
