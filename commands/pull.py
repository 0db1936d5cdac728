"""mmquant pull: a repository into a folder, verified."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import PartialError

from .options import DEFAULT_MODEL, dry_run_option, json_option

if TYPE_CHECKING:
    from ..convert.hub.store import HubFolder

WORK = ".mmquant.source"
TOGETHER = 2  # files at once; each comes in parallel ranges


@click.command(short_help="Fetch a repository, verified and resumable.")
@click.option("--model", default=None, help=f"hf:ORG/NAME[@REV] or ms:ORG/NAME[@REV].  [default: {DEFAULT_MODEL}]")
@click.option("--hub", type=click.Choice(["hf", "ms"]), default=None, help="With --repo, instead of --model.")
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
    return f"{hub or 'hf'}:{repo}" + (f"@{revision}" if revision else "")


def pull(store: HubFolder, names: list[str], out: Path) -> None:
    """Bring the named files into `out`; a file that is there with the listed digest is kept.

    Raises PartialError when the network gives up in between.
    """
    from ..convert.hub.fetch import need_disk, part_digest
    from ..convert.hub.http import TransferError

    todo = [n for n in names if not _is_whole(store, out / n, n, part_digest)]
    out.mkdir(parents=True, exist_ok=True)
    arrived = sum(p.stat().st_blocks * 512 for p in (out / WORK).rglob("shards/*") if p.is_file())
    need_disk(out, max(0, sum(store.files()[n] for n in todo) - arrived), store.label)

    def one(name: str) -> None:
        path = store.path(name)
        final = out / name
        final.parent.mkdir(parents=True, exist_ok=True)
        if path.is_relative_to(store.folder):
            path.replace(final)
        else:  # a hub's own cache
            temporary = final.with_name(final.name + ".tmp")
            shutil.copyfile(path, temporary)
            temporary.replace(final)

    try:
        with ThreadPoolExecutor(TOGETHER) as pool:
            for _ in pool.map(one, todo):
                pass
    except TransferError as error:
        here = sum((out / name).is_file() for name in names)
        raise PartialError(f"{error} ({here} of {len(names)} files are here)") from None
    finally:
        store.close()
    shutil.rmtree(out / WORK, ignore_errors=True)


def _is_whole(store: HubFolder, path: Path, name: str, digest: Any) -> bool:
    file = store.listing.files[name]
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest(path, file) == (file.sha256 or file.git)
