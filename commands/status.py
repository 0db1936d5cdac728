"""`mmquant status`: how far a run is."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option


@click.command(short_help="How far a run is.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@json_option()
def command(folder: Path, as_json: bool) -> None:
    """Tell of the run in FOLDER: running, finished, stopped or killed, layer, rates, what is left.

    Example: mmquant status ./m27
    """
    from ..runs.status import as_text, status

    click.echo(as_text(status(folder), as_json))
