"""Write NVFP4 and MXFP4 folders for vLLM, SGLang and TensorRT-LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.monitor import Monitor

from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.folder.weights import WeightsVariant, check_groups
from ..quantize.fp4.grid import MXFP4, NVFP4, Fp4Grid
from .models import Model
from .options import Mxfp4Options, Nvfp4Options, WeightsOptions
from .results import Quantized
from .weights import check_mixture, quantize_weights, weights_variant
from .weights_plan import planned_shape

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


def quantize_nvfp4(
    model: Model,
    out: str | Path,
    options: Nvfp4Options | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write NVFP4 weights into the folder `out`, calibrated in the same pass.

    W4A16, or W4A4 with `Nvfp4Options(activations="nvfp4")`. Arguments and errors as of `quantize_int4`.
    """
    chosen = options or Nvfp4Options()
    check_mixture("nvfp4", chosen)
    return quantize_weights(
        model, out, chosen, "nvfp4", nvfp4_variant, device=device, fetch=fetch, dry_run=dry_run, monitor=monitor
    )


def quantize_mxfp4(
    model: Model,
    out: str | Path,
    options: Mxfp4Options | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write MXFP4 weights (W4A16) into the folder `out`, calibrated in the same pass.

    Arguments and errors as of `quantize_int4`.
    """
    chosen = options or Mxfp4Options()
    return quantize_weights(
        model, out, chosen, "mxfp4", mxfp4_variant, device=device, fetch=fetch, dry_run=dry_run, monitor=monitor
    )


def nvfp4_variant(source: Checkpoint, options: Nvfp4Options, out: Path) -> WeightsVariant:
    """The NVFP4 artifact to write. InputError when its groups do not fit the model at the tensor parallelism."""
    bits = 16 if options.activations == "bf16" else 4
    return _variant(
        source, options, out, NVFP4, {"command": "nvfp4", "title": "NVFP4A{activations}", "activations": bits}
    )


def mxfp4_variant(source: Checkpoint, options: Mxfp4Options, out: Path) -> WeightsVariant:
    """The MXFP4 artifact to write; as `nvfp4_variant`."""
    return _variant(source, options, out, MXFP4, {"command": "mxfp4", "title": "MXFP4A{activations}"})


def _variant(
    source: Checkpoint, options: WeightsOptions, out: Path, grid: Fp4Grid, shape: dict[str, Any]
) -> WeightsVariant:
    sizes = (grid.group_size,)
    plan = planned_shape(source, options, shape["command"], shape["title"] + "-planned")
    if not plan:
        check_groups(source.geometry, grid.group_size, options.tp, options.attention, sizes)
    shape |= {"group_size": grid.group_size, "attention": options.attention}
    shape |= {"layout": options.format, "kv_cache": options.kv_cache, **plan}
    return weights_variant(source, options, out, shape, grid)
