"""A recipe's variants as jobs of the engine, which share what they can."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmquant.errors import InputError

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.bf16 import Bf16Variant
from ..convert.folder.fp8 import Fp8Variant
from ..convert.formats.table import choices
from . import fp4, gguf, int4, mlx
from .corpus import at_effort, context_of, windows_at_most
from .engine import Job
from .folder import FolderJob, prepare
from .made import words_of
from .options import (
    Bf16Options,
    CalibratedOptions,
    CalibrateOptions,
    Checked,
    Fp8Options,
    GgufOptions,
    Int4Options,
    MlxOptions,
    Mxfp4Options,
    Nvfp4Options,
    PlannedOptions,
    PruneOptions,
    TextOptions,
    WeightsOptions,
)
from .passes import Passes
from .recipe.read import Variant
from .weights import check_mixture, make_job

if TYPE_CHECKING:
    from ..convert.folder.mlx import MlxVariant
    from ..convert.folder.variant import FolderVariant
    from ..convert.folder.weights import WeightsVariant

    Shape = Callable[[Checkpoint, Any, Path], WeightsVariant | MlxVariant]

WEIGHTS: dict[type[Checked], tuple[str, Shape]] = {
    Int4Options: ("int4", int4.variant_of),
    Nvfp4Options: ("nvfp4", fp4.nvfp4_variant),
    Mxfp4Options: ("mxfp4", fp4.mxfp4_variant),
    MlxOptions: ("mlx", mlx.mlx_variant),
}


def check_variant(variant: Variant) -> None:
    """InputError for options that contradict each other, or that one pass for many cannot do."""
    options = variant.options
    if isinstance(options, Fp8Options) and choices("fp8")[options.scheme].nearest is None:
        raise InputError(f"{variant.name}: scheme native copies the shards as they are, expected block or channel")
    if isinstance(options, PruneOptions) and (options.experts or options.experts_kept):
        raise InputError(
            f"{variant.name}: a recipe's variants keep all experts, expected mmquant {variant.command} alone"
        )
    if isinstance(options, PlannedOptions) and (options.size is not None or options.target is not None):
        raise InputError(f"{variant.name}: size and target are planned before a run, expected plan: plan.json")
    if isinstance(options, Int4Options):
        int4.check_options(options)
    elif isinstance(options, MlxOptions):
        mlx.check_options(options)
    elif isinstance(options, WeightsOptions):
        check_mixture(variant.command, options)
    elif isinstance(options, GgufOptions):
        gguf.check_options(options)


def bytes_of(source: Checkpoint, variant: Variant, model: str, out: Path) -> tuple[str, int]:
    """Label and bytes of an artifact, from headers alone. InputError for what does not suit the model."""
    options = variant.options
    if isinstance(options, GgufOptions):
        shape = gguf.variant_of(source, options, model)
        return shape.label, gguf.make_plan(source, shape, None).bytes
    if isinstance(options, CalibrateOptions):
        return "statistics", 0
    made = folder_variant(source, options, out)
    return made.label, prepare(source, made).bytes


def streams_of(source: Checkpoint, variant: Variant) -> int:
    """Bytes of hidden states that a variant keeps for itself while the run lasts, at most."""
    options = variant.options
    if not isinstance(options, TextOptions) or getattr(options, "statistics", None) is not None:
        return 0
    if isinstance(options, GgufOptions):
        if not gguf.is_calibrated(options) or options.effort == "fast":
            return 0
    elif getattr(options, "method", None) == "rtn":
        return 0
    return 4 * windows_at_most(at_effort(options)) * context_of(source, options) * source.geometry.hidden


def job_of(source: Checkpoint, variant: Variant, model: str, out: Path, passes: Passes) -> Job:
    """The job that writes a variant into the folder `out`."""
    options = variant.options
    if isinstance(options, GgufOptions):
        shape = gguf.variant_of(source, options, model)
        return cast("Job", gguf.make_job(source, options, out, passes, shape))
    if isinstance(options, CalibrateOptions):
        from .statistics import StatisticsJob

        return cast("Job", StatisticsJob(source, options, out, passes))
    made = folder_variant(source, options, out)
    if isinstance(options, CalibratedOptions):
        return cast("Job", make_job(source, options, out, passes, cast("WeightsVariant", made)))
    job = FolderJob(source, made, out, device=passes.device, limit=options.max_shard_size)
    job.made = words_of("bf16" if isinstance(options, Bf16Options) else "fp8", options)
    return cast("Job", job)


def folder_variant(
    source: Checkpoint, options: Fp8Options | Bf16Options | CalibratedOptions, out: Path
) -> FolderVariant:
    """The safetensors artifact that options ask for. InputError for what does not suit the model."""
    if isinstance(options, Fp8Options):
        return Fp8Variant(options.scheme)
    if isinstance(options, Bf16Options):
        return Bf16Variant()
    return WEIGHTS[type(options)][1](source, options, out)


def asked_of(variant: Variant, source: Checkpoint) -> dict[str, Any]:
    """What decides an artifact's bytes, as far as the recipe says it: plain values for the journal."""
    options = {f.name: plain(getattr(variant.options, f.name)) for f in dataclasses.fields(variant.options)}
    return {"command": variant.command, "source": source.fingerprint, "options": options}


def plain(value: object) -> Any:  # noqa: ANN401 - JSON's values
    """A value of an option as JSON has it."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
