"""Write folders for mlx_lm: Apple silicon, without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import InputError
from mmquant.monitor import Monitor, message

from ..calibration.folder.mlx import CalibratedMlx
from ..calibration.folder.options import LayerOptions
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.kinds import EXPERT_FIELDS, Kind, group_name
from ..convert.folder.mlx import BF16, EIGHT_BIT, MlxVariant, kind
from ..convert.formats.table import choices
from ..convert.models.geometry import Geometry
from ..quantize.integer.gptq_grid import GptqGrid
from .models import Model
from .options import MlxOptions
from .results import Quantized
from .weights import STREAMS, quantize_weights
from .weights_plan import read_units

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

COMMAND = "mlx"


def quantize_mlx(
    model: Model,
    out: str | Path,
    options: MlxOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write mlx_lm's folder into `out`, calibrated in the same pass; no Mac is needed.

    Arguments and errors as of `quantize_int4`.
    """
    chosen = options or MlxOptions()
    check_options(chosen)
    return quantize_weights(
        model, out, chosen, COMMAND, mlx_variant, device=device, fetch=fetch, dry_run=dry_run, monitor=monitor
    )


def check_options(options: MlxOptions) -> None:
    """InputError for what the mode does not have."""
    row, usual, said = choices(COMMAND)[options.mode], MlxOptions(), f"--mode {options.mode}"
    if len(row.bits) > 1:
        return
    if (options.bits, options.group_size) != (usual.bits, usual.group_size):
        raise InputError(f"{said}: its bits and groups are fixed, expected no --bits or --group-size")
    if options.planned:
        raise InputError(f"{said} with a plan: expected {usual.mode}, whose widths may vary")
    if row.experts_only and COMMAND in (options.attention, options.embeddings):
        raise InputError(f"{said}: mlx_lm has it for experts alone, expected 8bit, bf16 ... beside them")


def mlx_variant(source: Checkpoint, options: MlxOptions, out: Path) -> MlxVariant:
    """The artifact to write. InputError when its groups do not divide the model's matrices."""
    g = source.geometry
    shape: dict[str, Any] = {"experts": kind(options.mode, options.bits, options.group_size)}
    shape |= {name: _beside(getattr(options, name), shape["experts"]) for name in ("attention", "embeddings")}
    if options.plan is not None:
        units = read_units(source, options.plan, COMMAND)
        shape |= {"experts": units[group_name(0, EXPERT_FIELDS[0])], "units": tuple(units.items())}
    check_groups(g, shape)
    if options.method == "rtn":
        return MlxVariant(**shape)
    chosen = LayerOptions(method=options.method, effort=options.effort, grid=GptqGrid(), seed=options.seed)
    streams = out / STREAMS if chosen.sign_rounded else None
    return CalibratedMlx(**shape, options=chosen, report=message, streams=streams)


def _beside(word: str, experts: Kind) -> Kind:
    bits = word.removesuffix("bit")
    if bits != word:
        mode, _, group = EIGHT_BIT
        return kind(mode, int(bits), group)
    return BF16 if word == BF16.word else experts


def check_groups(g: Geometry, shape: dict[str, Any]) -> None:
    """InputError for a group that does not divide the inputs of its matrices."""
    inputs = {"experts": (g.hidden, g.expert_width), "attention": (g.hidden, g.heads * g.head_dim)}
    for name, widths in (inputs | {"embeddings": (g.hidden,)}).items():
        chosen = shape[name]
        if chosen.storage is not None and not all(chosen.divides(width) for width in widths):
            found = " and ".join(map(str, widths))
            raise InputError(f"{name}: groups of {chosen.group} do not divide {found} inputs")
