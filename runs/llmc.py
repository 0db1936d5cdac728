"""Quantize by llm-compressor (--backend llmcompressor) as a second opinion, and check the result.

llm-compressor pins versions that exclude ours, so it runs in a Python of its own, named by MMQUANT_LLMCOMPRESSOR (by
default this one). It works on local folders, writes beside the target, and what it wrote counts once it was checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from mmquant.errors import InputError, MmquantError

from ..convert.carried import carried_files
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.checkpoints.quantized_folder import QuantizedFolder
from ..convert.checkpoints.store import LocalFolder
from ..convert.files.atomic import making, replace_folder, sha256_file, write_whole
from ..convert.files.child import SAFE_PATH, environment
from ..convert.files.lock import hold
from ..convert.files.parse import parse_json
from ..convert.fitting.weights import Weights
from ..convert.folder.check import check_folder
from ..convert.formats.compressed_tensors import NAME
from ..convert.manifest import FileEntry
from ..convert.models.names import TensorNames
from ..convert.remote_code import with_code
from .made import finish_folder
from .models import choose_device, opened
from .options import Int4Options
from .place import check_disk, describe, is_finished
from .results import Quantized

PYTHON = "MMQUANT_LLMCOMPRESSOR"  # the environment variable that names its Python
WORKER = Path(str(resources.files("mmquant").joinpath("data", "llmc_worker.py")))
ATTENTION = "re:.*self_attn.*"
FP8 = {"block": "FP8_BLOCK", "channel": "FP8_DYNAMIC"}


def fp8_job(scheme: str) -> dict[str, Any]:
    """What the worker is told for `mmquant fp8`. InputError for the copy, which quantizes nothing."""
    if scheme not in FP8:
        raise InputError(f"--backend llmcompressor --scheme {scheme}: expected {' or '.join(FP8)}")
    return {"scheme": FP8[scheme], "group_size": None, "ignore": []}


def int4_job(options: Int4Options) -> dict[str, Any]:
    """What the worker is told for `mmquant int4`. InputError for what llm-compressor does only with calibration."""
    expected = {
        "method": (options.method, ("rtn",)),
        "format": (options.format, (NAME,)),
        "attention": (options.attention, ("bf16", "int4")),
    }
    for name, (value, allowed) in expected.items():
        if value not in allowed:
            raise InputError(f"--backend llmcompressor --{name} {value}: expected {' or '.join(allowed)}")
    if options.eight_bit is not None or options.kv_cache != "bf16":
        raise InputError("--backend llmcompressor: expected no --eight-bit and no --kv-cache fp8")
    ignore = [ATTENTION] if options.attention == "bf16" else []
    scheme = "W4A16_ASYM" if options.asymmetric else "W4A16"
    return {"scheme": scheme, "group_size": options.group_size, "ignore": ignore}


def quantize_llmcompressor(
    model: str | Path, out: Path, job: dict[str, Any], *, device: str | None = None, dry_run: bool = False
) -> Quantized:
    """What `fp8_job` or `int4_job` describes, done by llm-compressor and checked by us."""
    with opened(model) as source:
        found = write_with_llmcompressor(source, job, out, choose_device(device), dry_run)
        return Quantized(out, job["scheme"], source.bytes, dry_run, str(found))


def write_with_llmcompressor(
    source: Checkpoint, job: dict[str, Any], out: Path, device: str, dry_run: bool = False
) -> Path | str:
    """The folder `out`, written by llm-compressor and read again by the self-check; a line of words for a dry run.

    Raises InputError when it is not installed, the model lies on a hub, or `out` holds something else.
    """
    if not source.store.is_local:
        raise InputError(f"--backend llmcompressor: {source.label} lies on a hub, expected a local folder")
    job = {**job, "ignore": [*unquantized(source.names), *job["ignore"]]}
    source.validate()
    if source.book is not None and not source.is_native:
        raise InputError(f"--backend llmcompressor: {source.label} is not the release's FP8, expected that or BF16")
    run = {"command": "llmcompressor", **job, "source": source.fingerprint}
    if is_finished(out, run):
        return out
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds {sorted(p.name for p in out.iterdir())[0]}, expected an empty folder")
    carried_files(source)  # llm-compressor copies them unread
    python = find_python()
    if dry_run:
        return describe(out, f"{job['scheme']} by llm-compressor, at most", source.bytes)
    with making(out.parent):
        check_disk(out.parent, source.bytes)
    partial = out.with_name(f".{out.name}.partial")
    made = partial / "made"
    tile = list(source.tile) if source.tile is not None else None
    told = {
        "model": str(source.store.folder.resolve()),
        "out": str(made.resolve()),
        "device": device,
        "tile": tile,
        **job,
    }
    partial.mkdir(exist_ok=True)
    with hold(partial):  # before anything in it is removed: it may be another process's
        try:
            shutil.rmtree(made, ignore_errors=True)
            _work(python, told, out.parent)
            _mend_config(made)
            check_folder(made, source)
            files = tuple(FileEntry(p.name, p.stat().st_size, sha256_file(p)) for p in sorted(made.iterdir()))
            finish_folder(made, source, NAME, job["scheme"], files, _weights(made), run)
            replace_folder(made, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def unquantized(names: TensorNames) -> tuple[str, ...]:
    """What llm-compressor leaves alone, by the release's names."""
    return "lm_head", f"re:.*{names.router}$", "re:.*embed_tokens$"


def find_python() -> str:
    """The Python that can import llmcompressor. InputError, one line, when there is none."""
    python = os.environ.get(PYTHON, sys.executable)
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    try:
        missing = subprocess.run(
            [python, SAFE_PATH, "-c", probe], env=environment({}), capture_output=True, check=False
        ).returncode
    except OSError as error:
        raise InputError(f"{PYTHON}={python}: {error.strerror}, expected a Python that has llmcompressor") from None
    if missing:
        raise InputError(
            f"--backend llmcompressor: {python} has no llmcompressor; install it in an environment of its own "
            f"(pip install llmcompressor) and set {PYTHON} to that environment's python"
        )
    return python


def _work(python: str, told: dict[str, Any], folder: Path) -> None:
    # As text, not as a file: a file's folder would come first among the modules.
    command = [python, SAFE_PATH, "-W", "ignore", "-c", WORKER.read_text("utf-8"), json.dumps(told)]
    given = environment({"HF_HUB_OFFLINE": "1"})
    done = subprocess.run(command, capture_output=True, text=True, env=given, cwd=folder, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise MmquantError(f"llm-compressor failed (exit {done.returncode}): {last[-1]}")


def _mend_config(folder: Path) -> None:
    """Entries of auto_map whose code llm-compressor did not bring along are taken out of config.json."""
    path = folder / "config.json"
    config = parse_json(path.read_bytes(), str(path))
    kept = with_code(config, LocalFolder(folder).small)
    if kept != config:
        write_whole(path, (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())


def _weights(folder: Path) -> Weights:
    found = QuantizedFolder(LocalFolder(folder))
    experts = [0] * found.geometry.layers
    for name, info in found.tensors.items():
        layer = found.names.layer_of(name)
        if layer is not None and ".experts." in name:
            experts[layer] += info.size
    return Weights(found.bytes - sum(experts), tuple(experts))
