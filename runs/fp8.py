"""Write FP8 folders for vLLM and SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import InputError
from mmquant.monitor import Monitor, watching

from ..convert.folder.fp8 import Fp8Variant
from ..convert.folder.native_copy import check_native
from ..convert.formats.table import choices
from .folder import write_folder
from .folder_steps import prepare
from .made import words_of
from .models import Model, choose_device, opened
from .native import write_native
from .needs import needs_of
from .options import Fp8Options
from .place import check_place
from .prune import pruned
from .results import Quantized, planned, written

if TYPE_CHECKING:
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions


def quantize_fp8(
    model: Model,
    out: str | Path,
    options: Fp8Options | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    dry_run: bool = False,
    monitor: Monitor | None = None,
) -> Quantized:
    """Write FP8 weights into the folder `out`; a finished folder of the same run is left alone.

    model     folder, `hf:ORG/NAME[@REV]`, `ms:ORG/NAME[@REV]`, `demo`, or an opened checkpoint
    device    cpu, cuda or cuda:N; by default a GPU when there is one
    dry_run   nothing is written; the result says what would be, and what would stop it

    Raises InputError when the model or `out` is not what is needed, FitError when the disk is too small.
    """
    chosen, out = options or Fp8Options(), Path(out)
    with watching(monitor), opened(model, fetch, None if dry_run else out) as given:
        source = pruned(given, chosen)
        if choices("fp8")[chosen.scheme].nearest is None:  # the release as it is
            if source.kept is not None:
                raise InputError("--scheme native copies shards as they are, expected block or channel to drop experts")
            return _native(source, out, dry_run)
        variant = Fp8Variant(chosen.scheme)
        size = prepare(source, variant).bytes
        if dry_run:
            run = {**variant.run(), "source": source.fingerprint, "shard_limit": chosen.max_shard_size}
            needs = needs_of(source, out, size, choose_device(device))
            return planned(out, variant.label, needs, lambda: check_place(out, size, run))
        place = choose_device(device)
        path = write_folder(
            source, variant, out, device=place, limit=chosen.max_shard_size, made=words_of("fp8", chosen)
        )
        return written(path, variant.label, size)


def _native(source: Checkpoint, out: Path, dry_run: bool) -> Quantized:
    check_native(source)
    if dry_run:
        run = {"command": "fp8", "scheme": "native", "source": source.fingerprint}
        needs = needs_of(source, out, source.bytes, "cpu")
        return planned(out, "FP8-native", needs, lambda: check_place(out, source.bytes, run))
    return written(write_native(source, out), "FP8-native", source.bytes)
