"""Copy the release's own FP8 into a folder, verified."""

from __future__ import annotations

from pathlib import Path

from mmquant.monitor import phase

from ..convert.carried import carried_files
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.files.progress import Progress
from ..convert.fitting.weights import Weights
from ..convert.folder.native_copy import check_native, copy_native
from ..convert.formats import fp8_native
from .made import finish_folder
from .place import check_disk, claim, is_finished, written_bytes


def write_native(source: Checkpoint, out: Path) -> Path:
    """Copy the release as it is, verified, with a manifest."""
    source.validate()
    check_native(source)
    run = {"command": "fp8", "scheme": "native", "source": source.fingerprint}
    if is_finished(out, run):
        return out
    small = carried_files(source)
    with claim(out, run):
        check_disk(out, source.bytes - written_bytes(out), source)
        progress = Progress(out, run, "", 0)
        with phase("FP8-native", None, "shard") as bar:
            files = copy_native(source, out, small, lambda _: bar.advance())
        tensors = [t for n, t in source.tensors.items() if n not in source.skipped]
        layers = range(source.geometry.layers)
        sizes = {layer: 0 for layer in layers}
        for tensor in tensors:
            layer = source.names.layer_of(tensor.name)
            if layer is not None and source.names.is_expert(tensor.name):
                sizes[layer] += tensor.size
        experts = tuple(sizes[layer] for layer in layers)
        finish_folder(
            out,
            source,
            fp8_native.FORMAT.manifest,
            "FP8-native",
            files,
            Weights(source.bytes - sum(experts), experts),
            run,
        )
        progress.clear()
    return out
