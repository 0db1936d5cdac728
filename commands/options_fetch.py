"""Options of every command that may read its model from a hub, and the opening of it."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import Decorator, parse_size

if TYPE_CHECKING:
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions
    from ..convert.source import Source

WORK = ".mmquant.source"  # inside the folder that is written: shards in use, headers, small files


def fetch_options() -> Decorator:
    """--max-disk, --max-shards, --keep-shards and --transport; the command gets one argument, `fetch`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(max_disk: int | None, max_shards: int, keep_shards: bool, transport: str, **others: Any) -> Any:
            from ..convert.hub.store import FetchOptions

            fetch = FetchOptions(max_disk=max_disk, max_shards=max_shards, keep_shards=keep_shards, transport=transport)
            return function(fetch=fetch, **others)

        wrapped: Callable[..., Any] = command
        for option in reversed(_options()):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _options() -> list[Decorator]:
    disk = "Most bytes of the source's shards on disk at once, for example 20GB."
    shards = "Most shards of the source on disk at once."
    keep = "Keep the fetched shards instead of deleting each after its last use."
    transport = "http: resumable ranges; xet: the hub's accelerated path, watched, with http as the way out."
    return [
        click.option("--max-disk", default=None, callback=_bytes, metavar="SIZE", help=disk),
        click.option("--max-shards", default=8, show_default=True, type=click.IntRange(min=1), help=shards),
        click.option("--keep-shards", is_flag=True, help=keep),
        click.option(
            "--transport", type=click.Choice(["http", "xet"]), default="http", show_default=True, help=transport
        ),
    ]


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


def open_model(model: str, fetch: FetchOptions, out: Path | None = None) -> Checkpoint:
    """Open --model. Shards of a hub's model lie inside `out` while they are needed, and the commit is pinned there;
    without `out` (dry runs, inspection) small files and headers go to the user's cache.
    """
    from ..convert.open import open_native

    if not model.startswith(("hf:", "ms:")):
        return open_native(model)
    if out is not None and (out.is_dir() or not out.exists()):
        rank = os.environ.get("RANK", "0")  # under torchrun every process has a folder of its own
        fetch = replace(fetch, work=out / (WORK if rank == "0" else f"{WORK}-{rank}"))
    source = open_native(model, fetch)
    _close_with_command(source)
    return source


def open_any(model: str, fetch: FetchOptions | None) -> Source:
    """Open a model or artifact that is only read (`eval`); shards of a hub's pass through the user's cache."""
    from ..convert.open import open_source

    source = open_source(model, fetch)
    _close_with_command(source)
    return source


def _close_with_command(source: Source) -> None:
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(lambda: close_model(source))


def close_model(source: Source, finished: bool = False) -> None:
    """Stop fetching; when the output is finished, the work folder in it goes (unless the shards are to be kept)."""
    from ..convert.hub.store import HubFolder
    from ..convert.manifest import MANIFEST

    store = getattr(source, "store", None)
    if not isinstance(store, HubFolder):
        return
    store.close(finished)
    options = store.options
    if options.work is None or options.keep_shards:
        return
    if finished or (options.work.parent / MANIFEST).exists():
        shutil.rmtree(options.work, ignore_errors=True)
