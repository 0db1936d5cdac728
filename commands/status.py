"""`mmquant status`: how far a run is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mmquant.tables import folded

from .display import CLEAR, UP, size_of
from .options import json_option
from .terminal import harmless, print_result

EVERY = 2.0  # seconds between two looks


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@json_option()
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until the run ends.")
def command(folder: Path, as_json: bool, watch: bool) -> None:
    """Show the run in FOLDER: running, finished, stopped or killed, its layer, its rates, what is left.

    Example: mmquant status ./m27 --watch
    """
    from ..runs.status import as_text, status

    found = status(folder)
    while watch and found.state == "running":
        if sys.stdout.isatty() and not as_json:
            glance("\n".join(found.lines()))
        else:
            print_result(as_text(found, as_json), as_json)
            time.sleep(EVERY)
        found = status(folder)
    print_result(as_text(found, as_json), as_json)


def glance(text: str) -> None:
    """Show a text for a while on the terminal, as much as fits, and take it away again: no line wraps or scrolls."""
    columns, rows = size_of(sys.stdout)
    lines = [line[: columns - 1] for line in folded(harmless(text), columns - 1).split("\n")][: rows - 1]
    click.echo("\n".join(lines))
    time.sleep(EVERY)
    click.echo(UP.format(len(lines)) + CLEAR, nl=False)
