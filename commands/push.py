"""`mmquant push`: publish a finished folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..runs.options_use import PushOptions
from .options import dry_run_option, json_option, options_of
from .terminal import print_result


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository; made when it does not exist.")
@options_of(PushOptions, device=False)
@json_option()
@dry_run_option()
def command(folder: Path, repo: str, options: PushOptions, as_json: bool, dry_run: bool) -> None:
    """Upload FOLDER: weights first, card and manifest last, in few commits; run again to continue.

    Example: mmquant push ./m27-gguf --hub hf --repo me/MiniMax-M2.7-GGUF
    """
    from ..runs.push import push

    found = push(folder, repo, options, dry_run=dry_run)
    print_result(json.dumps(found.to_dict()) if as_json else found.line(), as_json)
