"""A recipe's variants as jobs of the engine, which share what they can."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmquant.errors import InputError

from ..calibration.model.distributed import world
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.bf16 import Bf16Variant
from ..convert.folder.fp8 import Fp8Variant
from ..convert.formats.table import choices
from . import fp4, gguf, int4, mlx
from .corpus import at_effort, context_of, windows_at_most
from .engine import Job
from .folder import FolderJob
from .folder_steps import prepare
from .made import words_of
from .option import Checked
from .options import (
    Bf16Options,
    CalibratedOptions,
    CalibrateOptions,
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
from .plan import SENSITIVITY
from .plan_first import WORK, with_plan
from .recipe.read import Variant
from .run_fit import Shape
from .weights import check_mixture, make_job

if TYPE_CHECKING:
    from ..convert.folder.mlx import MlxVariant
    from ..convert.folder.variant import FolderVariant
    from ..convert.folder.weights import WeightsVariant

    Make = Callable[[Checkpoint, Any, Path], WeightsVariant | MlxVariant]

WEIGHTS: dict[type[Checked], tuple[str, Make]] = {
    Int4Options: ("int4", int4.variant_of),
    Nvfp4Options: ("nvfp4", fp4.nvfp4_variant),
    Mxfp4Options: ("mxfp4", fp4.mxfp4_variant),
    MlxOptions: ("mlx", mlx.mlx_variant),
}


def check_variant(variant: Variant) -> None:
    """InputError for options that contradict each other, or that one pass for many cannot do."""
    options = variant.options
    if isinstance(options, Fp8Options) and choices("fp8")[options.scheme].nearest is None:
        raise InputError("scheme native copies the shards as they are, expected block or channel")
    if isinstance(options, PruneOptions) and (options.experts or options.experts_kept):
        raise InputError(f"a recipe's variants keep all experts, expected mmquant {variant.command} alone")
    if isinstance(options, Int4Options):
        int4.check_options(options)
    elif isinstance(options, MlxOptions):
        mlx.check_options(options)
    elif isinstance(options, WeightsOptions):
        check_mixture(variant.command, options)
    elif isinstance(options, GgufOptions):
        gguf.check_options(options)


def shape_of(source: Checkpoint, variant: Variant, model: str, out: Path) -> Shape | None:
    """What an artifact will be, by headers; None for statistics. InputError for what does not suit the model."""
    options = variant.options
    if isinstance(options, GgufOptions):
        shape = gguf.variant_of(source, options, model)
        plan = gguf.make_plan(source, shape, None)
        return Shape(shape.label, plan.bytes, plan.weights(), "gguf", shape.run())
    if isinstance(options, CalibrateOptions):
        return None
    made = folder_variant(source, options, out)
    found = prepare(source, made)
    return Shape(made.label, found.bytes, found.weights, made.format, made.run())


class Plans:
    """Plans of variants that name a size or a machine; what was measured for one serves all of its kind.

    folder: of the run. passes: how many measurements there are, each a pass over the source.
    """

    def __init__(self, source: Checkpoint, out: Path, device: str) -> None:
        self.source, self.out, self.device = source, out, device
        self._measured: dict[tuple[object, ...], Path] = {}

    def is_measured(self, out: Path) -> bool:
        """Whether what the plan of an artifact needs is there."""
        return (out / WORK / SENSITIVITY).exists()

    def planned(self, variant: Variant, dry_run: bool = False) -> Variant:
        """The variant with a plan in place of its size or machine; unchanged where it names none."""
        options = variant.options
        if not isinstance(options, PlannedOptions) or (options.size is None and options.target is None):
            return variant
        if world()[1] > 1:
            raise InputError("size and target are planned without torchrun, expected plan: as mmquant plan makes it")
        texts = tuple(str(getattr(options, field.name)) for field in dataclasses.fields(TextOptions))
        kind = (variant.command, options.judged_windows, getattr(options, "tp", None), *texts)
        if options.sensitivity is None and kind in self._measured:
            options = dataclasses.replace(options, sensitivity=self._measured[kind])
        out = self.out / variant.name
        made = with_plan(self.source, options, out, self.device, dry_run, variant.command)
        if options.sensitivity is None:
            self._measured[kind] = out / WORK / SENSITIVITY
        return dataclasses.replace(variant, options=made)


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
