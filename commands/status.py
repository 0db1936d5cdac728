"""`mmquant status`: how far a run is."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from .display import CLEAR, UP
from .options import json_option

EVERY = 2.0  # seconds between two looks


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@json_option()
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until the run ends.")
def command(folder: Path, as_json: bool, watch: bool) -> None:
    """Tell of the run in FOLDER: running, finished, stopped or killed, layer, rates, what is left.

    Example: mmquant status ./m27 --watch
    """
    from ..runs.status import as_text, status

    found = status(folder)
    while watch and found.state == "running":
        text = as_text(found, as_json)
        click.echo(text)
        time.sleep(EVERY)
        if sys.stdout.isatty() and not as_json:
            click.echo(UP.format(text.count("\n") + 1) + CLEAR, nl=False)
        found = status(folder)
    click.echo(as_text(found, as_json))
