"""`mmquant demo`: run the whole pipeline on the bundled model."""

from __future__ import annotations

from pathlib import Path

import click

from .options import device_option, json_option
from .terminal import print_result


@click.command()
@click.option("--out", default="demo-out", show_default=True, type=click.Path(path_type=Path), help="Folder to write.")
@device_option()
@json_option()
def command(out: Path, device: str, as_json: bool) -> None:
    """Write the bundled model in every format, check each against the reference, and print what it costs and fits.

    Example: mmquant demo --out ./demo-out
    """
    import json

    from ..runs.demo import run_demo, table

    rows = run_demo(out, device)
    print_result(json.dumps(rows) if as_json else table(rows), as_json)
    if not as_json:
        print_result(f"manifests: {out}/*/mmquant.fit.json, report: {out}/report.html")
