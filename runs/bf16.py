"""Write BF16 folders: the release without its quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.monitor import Monitor, watching

from ..convert.folder.bf16 import Bf16Variant
from .folder import write_folder
from .folder_steps import prepare
from .made import words_of
from .models import Model, choose_device, opened
from .needs import needs_of
from .options import Bf16Options
from .place import check_place
from .prune import pruned
from .results import Quantized, planned, written

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


def dequantize_bf16(
    model: Model,
    out: str | Path,
    options: Bf16Options | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write the model in bfloat16 into the folder `out`, for fine-tuning; a finished folder of the same run stays.

    Every FP8 code times its scale, rounded once. Arguments as of `quantize_fp8`.

    Raises InputError when the model or `out` is not what is needed, FitError when the disk is too small.
    """
    chosen, out, variant = options or Bf16Options(), Path(out), Bf16Variant()
    with watching(monitor), opened(model, fetch, None if dry_run else out) as given:
        source = pruned(given, chosen)
        size = prepare(source, variant).bytes
        if dry_run:
            run = {**variant.run(), "source": source.fingerprint, "shard_limit": chosen.max_shard_size}
            needs = needs_of(source, out, size, choose_device(device))
            return planned(out, variant.label, needs, lambda: check_place(out, size, run))
        path = write_folder(
            source,
            variant,
            out,
            device=choose_device(device),
            limit=chosen.max_shard_size,
            made=words_of("bf16", chosen),
        )
        return written(path, variant.label, size)
