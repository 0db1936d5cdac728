"""`mmquant report`: one HTML page of finished artifacts."""

from __future__ import annotations

from pathlib import Path

import click

from mmquant.tables import plural

from .options import json_option
from .terminal import print_result

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=FILE)
@click.option("--out", type=FILE, help="The page; default mmquant.report.html in FOLDER.")
@click.option("--eval", "evaluations", type=FILE, multiple=True, help="A result of eval --json (repeatable).")
@json_option()
def command(folder: Path, out: Path | None, evaluations: tuple[Path, ...], as_json: bool) -> None:
    """Write one HTML page about FOLDER: an artifact, or what run or demo wrote.

    Sizes and distances with intervals, which machine runs what by which command, layers and experts, origin. The page
    needs no network; its plots need matplotlib.

    Example: mmquant report ./demo-out
    """
    import json

    from ..runs.report import report

    made = report(folder, out, evaluations)
    said = f"{made.path}: {plural(len(made.artifacts), 'artifact')}"
    print_result(json.dumps(made.to_dict()) if as_json else said, as_json)
