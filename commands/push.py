"""`mmquant push`: publish a finished folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..convert.hub.hubs import DEFAULT_HUB, HUBS, SPEC
from .options import dry_run_option, json_option


@click.command(short_help="Publish a finished folder.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--hub",
    type=click.Choice(list(HUBS)),
    default=DEFAULT_HUB.key,
    show_default=True,
    help=", ".join(hub.name for hub in HUBS.values()) + ".",
)
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository; made when it does not exist.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", default=None, help="Branch; default: main, on ModelScope master.")
@click.option("--pr", "request", is_flag=True, help="Into a pull request (Hugging Face).")
@click.option("--delete-after-upload", "delete", is_flag=True, help="Delete each weight file once it is committed.")
@click.option(
    "--base-card", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The base model's README.md."
)
@click.option("--base-model", metavar="ORG/NAME", help="The card's base_model; default: the repository that was read.")
@click.option("--license", "license_id", metavar="ID", help="The card's licence; default: the base model's.")
@json_option()
@dry_run_option()
def command(
    folder: Path,
    hub: str,
    repo: str,
    private: bool,
    revision: str | None,
    request: bool,
    delete: bool,
    base_card: Path | None,
    base_model: str | None,
    license_id: str | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Upload FOLDER: weights first, card and manifest last, in few commits; run again to continue.

    Example: mmquant push ./m27-gguf --hub hf --repo me/MiniMax-M2.7-GGUF
    """
    from ..convert.files.lock import hold
    from ..convert.hub.http import Client
    from ..convert.hub.hubs import endpoint_of, remote_of
    from ..runs.push import CardOptions, push

    _check_repo(repo)
    if base_model is not None:
        _check_repo(base_model, "--base-model")
    if license_id is not None and (not license_id.strip() or not license_id.isprintable() or len(license_id) > 96):
        raise click.UsageError(f"--license {license_id[:96]!r}: expected a licence's id or its name, one line")
    if request and (not HUBS[hub].pull_requests or revision):
        raise click.UsageError("--pr: Hugging Face only, and without --revision")
    client = Client(endpoint_of(hub))
    remote = remote_of(client, repo, revision)
    with hold(folder):
        card = CardOptions(base_card, base_model, license_id)
        result = push(folder, remote, card, private=private, request=request, delete=delete, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(result))
    else:
        verb = "would publish" if dry_run else "published" if result["commits"] else "found whole"
        click.echo(f"{verb} {result['files']} files, {result['bytes']:,} bytes, as {result['url']}")


def _check_repo(repo: str, option: str = "--repo") -> None:
    if not SPEC.fullmatch(f"{DEFAULT_HUB.key}:{repo}") or "@" in repo or ".." in repo:
        raise click.BadParameter(f"{repo!r}, expected ORG/NAME", param_hint=option)
