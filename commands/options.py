"""Options that several commands share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mmquant.errors import InputError

DEFAULT_MODEL = "hf:MiniMaxAI/MiniMax-M2.7"

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def model_option() -> Decorator:
    text = "Folder, hf:ORG/NAME[@REV], ms:ORG/NAME[@REV] or demo."
    return click.option("--model", default=DEFAULT_MODEL, show_default=True, help=text)


def out_option() -> Decorator:
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")


def device_option() -> Decorator:
    text = "cpu, cuda or cuda:N; default: cuda when there is one."
    return click.option("--device", default=None, callback=_device, help=text)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    import torch

    if value is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"{value!r}, expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise click.BadParameter(f"{value!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{value!r}, expected cpu, cuda or cuda:N")
    return value


def shard_option() -> Decorator:
    text = "Largest output shard, for example 5GB."
    return click.option("--max-shard-size", "limit", default="5GB", show_default=True, callback=_size, help=text)


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    return parse_size(value)


def parse_size(text: str) -> int:
    """98GB, 512MiB or plain bytes -> bytes; powers of 1000 for B units, of 1024 for iB units."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    number = text.strip().rstrip("BKMGTIbkmgti").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise click.BadParameter(f"{text!r}, expected a size such as 5GB or 512MiB") from None
    if size <= 0:
        raise click.BadParameter(f"{text!r}, expected more than 0 bytes")
    return size


def json_option() -> Decorator:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def dry_run_option() -> Decorator:
    return click.option("--dry-run", is_flag=True, help="Print the plan and the bytes it needs; write nothing.")


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file that could not be written in the end, before any work: InputError. Makes the folder it lies in."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise InputError(f"{option} {path}: a folder, expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}, expected a place that can be written") from None
