"""`mmquant pull`: download a repository into a folder, verified."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..convert.hub.hubs import DEFAULT_HUB, HUBS
from ..runs.options_use import PullOptions
from .options import DEFAULT_MODEL, dry_run_option, json_option, options_of
from .terminal import print_result


@click.command()
@click.option("--model", default=None, help=f"hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV].  [default: {DEFAULT_MODEL}]")
@click.option("--hub", type=click.Choice(list(HUBS)), default=None, help="With --repo, instead of --model.")
@click.option("--repo", default=None, metavar="ORG/NAME", help="With --hub, instead of --model.")
@click.option("--revision", default=None, help="Branch, tag or commit; with --repo.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@options_of(PullOptions, device=False)
@json_option()
@dry_run_option()
def command(
    model: str | None,
    hub: str | None,
    repo: str | None,
    revision: str | None,
    out: Path,
    options: PullOptions,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Fetch every file of a repository at one commit; each is checked against the hub's SHA-256. Run again to continue.

    Example: mmquant pull --model hf:MiniMaxAI/MiniMax-M2.7 --out ./m27
    """
    from ..runs.pull import pull

    found = pull(_spec(model, hub, repo, revision), out, options, dry_run=dry_run)
    print_result(json.dumps(found.to_dict()) if as_json else found.line(), as_json)


def _spec(model: str | None, hub: str | None, repo: str | None, revision: str | None) -> str:
    if repo is None:
        if hub or revision:
            raise click.UsageError("--hub and --revision go with --repo; with --model write hf:ORG/NAME@REV")
        return model or DEFAULT_MODEL
    if model is not None:
        raise click.UsageError("--model and --repo name a repository twice, expected one of them")
    return f"{hub or DEFAULT_HUB.key}:{repo}" + (f"@{revision}" if revision else "")
