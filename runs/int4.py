"""Write INT4 folders for vLLM and SGLang."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import Monitor

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.weights import WeightsVariant, check_groups
from ..convert.formats.table import choices
from ..quantize.integer.gptq_grid import GptqGrid
from .models import Model
from .options import Int4Options
from .results import Quantized
from .weights import check_mixture, quantize_weights, weights_variant
from .weights_plan import planned_shape

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


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
    chosen = options or Int4Options()
    check_options(chosen)
    return quantize_weights(
        model, out, chosen, "int4", variant_of, device=device, fetch=fetch, dry_run=dry_run, monitor=monitor
    )


def check_options(options: Int4Options) -> None:
    """InputError for what the format cannot hold."""
    layers_of(options.eight_bit)
    if options.planned and options.asymmetric:
        raise InputError("--asymmetric with a plan: widths vary by layer in symmetric formats alone")
    symmetric = symmetric_of(options)
    check_mixture("int4", options)
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


def variant_of(source: Checkpoint, options: Int4Options, out: Path) -> WeightsVariant:
    """The artifact to write. InputError when its groups do not fit the model at the tensor parallelism."""
    plan = planned_shape(source, options, "int4", "W4A16-planned")
    if not plan:
        check_groups(source.geometry, options.group_size, options.tp, options.attention)
    shape: dict[str, Any] = {"group_size": options.group_size, "attention": options.attention}
    shape |= {"layout": options.format, "eight_bit": layers_of(options.eight_bit), "kv_cache": options.kv_cache}
    symmetric = symmetric_of(options)
    shape |= {"symmetric": symmetric, **plan}
    grid = GptqGrid(4, shape["group_size"], symmetric)
    return weights_variant(source, options, out, shape, grid)


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
