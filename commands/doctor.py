"""`mmquant doctor`: check and repair a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmquant.errors import GateError

from .options import device_option, json_option, refuse_without_effect

FILE = click.Path(path_type=Path)


@click.command(short_help="Finds and repairs what breaks a GGUF file.")
@click.argument("file")
@click.option("--statistics", type=FILE, help="What `mmquant calibrate --out` wrote: its maxima show what overflows.")
@click.option("--text", "texts", multiple=True, help="Measure by running this text (or `default`) through the file.")
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True, help="Windows at most, for --text.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--fix", is_flag=True, help="Rescale the experts that overflow, exactly.")
@click.option("--out", type=FILE, help="Folder for the fixed copy; default: FILE's folder with -fixed appended.")
@click.option("--in-place", is_flag=True, help="Fix the file itself instead of a copy.")
@device_option()
@json_option()
def command(
    file: str,
    statistics: Path | None,
    fix: bool,
    out: Path | None,
    in_place: bool,
    device: str,
    as_json: bool,
    **text: Any,
) -> None:
    """Look for float16 overflow on CUDA, dead or non-finite experts and wrong metadata in any minimax-m2 GGUF.

    FILE may be hf:ORG/NAME:TYPE as well: its parts are fetched, and deleted in the end (no --fix then).

    Exit code 4 when something is found that gives wrong results and is not repaired by --fix.

    Example: mmquant doctor ./m27-gguf/demo-Q4_K_M.gguf --text default --fix
    """
    import json

    from ..runs.doctor import examine

    if not text["texts"]:
        refuse_without_effect("without --text", "windows", "context")
    if not fix:
        refuse_without_effect("without --fix", "out", "in_place")

    found = examine(file, statistics=statistics, text=text, fix=fix, out=out, in_place=in_place, device=device)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines()))
    if found.errors:
        first = found.errors[0]
        raise GateError(f"{file}: {first.where}: {first.text} ({len(found.errors)} errors)")
