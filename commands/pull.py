"""`mmquant pull`: download a repository into a folder, verified."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import click

from ..convert.hub.hubs import DEFAULT_HUB, HUBS
from .options import DEFAULT_MODEL, dry_run_option, json_option


@click.command(short_help="Fetch a repository, verified and resumable.")
@click.option("--model", default=None, help=f"hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV].  [default: {DEFAULT_MODEL}]")
@click.option("--hub", type=click.Choice(list(HUBS)), default=None, help="With --repo, instead of --model.")
@click.option("--repo", default=None, metavar="ORG/NAME")
@click.option("--revision", default=None, help="Branch, tag or commit; with --repo.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only files like this; may be repeated.")
@click.option("--transport", type=click.Choice(["http", "xet"]), default="http", show_default=True)
@json_option()
@dry_run_option()
def command(
    model: str | None,
    hub: str | None,
    repo: str | None,
    revision: str | None,
    out: Path,
    include: tuple[str, ...],
    transport: str,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Fetch every file of a repository at one commit; each is checked against the hub's SHA-256. Run again to continue.

    Example: mmquant pull --model hf:MiniMaxAI/MiniMax-M2.7 --out ./m27
    """
    from ..convert.hub.store import FetchOptions, hub_source
    from ..runs.models import WORK
    from ..runs.pull import pull

    spec = _spec(model, hub, repo, revision)
    options = FetchOptions(transport=transport, keep_shards=True, max_shards=None)
    if out.exists() and not out.is_dir():
        raise click.BadParameter(f"{out} is a file, expected a folder or nothing", param_hint="--out")
    store = hub_source(spec, options if dry_run else replace(options, work=out / WORK))
    names = [n for n in sorted(store.files()) if not include or any(fnmatch(n, glob) for glob in include)]
    if not names:
        raise click.UsageError(f"--include {' '.join(include)}: none of the {len(store.files())} files of {spec} match")
    size = sum(store.files()[n] for n in names)
    answer = {"model": spec, "revision": store.revision, "files": len(names), "bytes": size, "out": str(out)}
    if not dry_run:
        pull(store, names, out)
    if as_json:
        click.echo(json.dumps(answer))
    else:
        verb = "would fetch" if dry_run else "fetched"
        click.echo(f"{verb} {len(names)} files, {size:,} bytes of {store.label} into {out}")


def _spec(model: str | None, hub: str | None, repo: str | None, revision: str | None) -> str:
    if repo is None:
        if hub or revision:
            raise click.UsageError("--hub and --revision go with --repo; with --model write hf:ORG/NAME@REV")
        return model or DEFAULT_MODEL
    if model is not None:
        raise click.UsageError("--model and --repo name a repository twice, expected one of them")
    return f"{hub or DEFAULT_HUB.key}:{repo}" + (f"@{revision}" if revision else "")
