"""Options of commands that read a model from a hub, and opening that model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from ..convert.hub.options import FetchOptions
from .options import Decorator, size

FETCHED = ("max_disk", "max_shards", "keep_shards", "transport")


def fetch_options() -> Decorator:
    """--max-disk, --max-shards, --keep-shards and --transport; the command gets one argument, `fetch`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(
            max_disk: int | None, max_shards: int, keep_shards: bool, transport: str, **others: object
        ) -> object:
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
    default = {field.name: field.default for field in fields(FetchOptions)}
    return [
        click.option("--max-disk", default=default["max_disk"], callback=size, metavar="SIZE", help=disk),
        click.option(
            "--max-shards", default=default["max_shards"], show_default=True, type=click.IntRange(min=1), help=shards
        ),
        click.option("--keep-shards", is_flag=True, default=default["keep_shards"], help=keep),
        click.option(
            "--transport",
            type=click.Choice(["http", "xet"]),
            default=default["transport"],
            show_default=True,
            help=transport,
        ),
    ]
