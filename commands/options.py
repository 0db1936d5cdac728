"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mmquant.errors import InputError

from ..runs.sizes import parse_size

DEFAULT_MODEL = "hf:MiniMaxAI/MiniMax-M2.7"

SEED = click.IntRange(0, 2**32 - 1)  # what every generator takes

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def model_option() -> Decorator:
    text = "Folder, hf:ORG/NAME[@REV], ms:ORG/NAME[@REV] or demo."
    return click.option("--model", default=DEFAULT_MODEL, show_default=True, help=text)


def out_option() -> Decorator:
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")


def device_option() -> Decorator:
    text = "cpu, cuda or cuda:N; default: cuda when there is one."
    return click.option("--device", default=None, callback=_device, help=text)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    from ..runs.models import choose_device

    try:
        return choose_device(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


def shard_option() -> Decorator:
    text = "Largest output shard, for example 5GB."
    return click.option("--max-shard-size", "limit", default="5GB", show_default=True, callback=size, help=text)


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Callback of options that take a size: bytes, or None where nothing was given."""
    try:
        return None if value is None else parse_size(value)
    except InputError as error:
        raise click.BadParameter(str(error)) from None


def fresh_option() -> Decorator:
    text = "Remove an unfinished run in --out and start over."
    return click.option("--fresh", is_flag=True, expose_value=False, callback=_fresh, help=text)


def _fresh(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Remembers the wish; `begin` carries it out once everything else that was typed is known to be right."""
    ctx.meta["mmquant.fresh"] = value


def begin(out: Path, dry_run: bool) -> Path | None:
    """The folder in which the command may work from now on: cleared for --fresh, None for a dry run."""
    if dry_run:
        return None
    if click.get_current_context().meta["mmquant.fresh"]:
        from ..runs.place import start_over

        start_over(out)
    return out


def refuse_without_effect(why: str, *names: str) -> None:
    """InputError naming the first option that was typed though it changes nothing; names: of parameters."""
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        typed = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and typed:
            raise InputError(f"{parameter.opts[0]} has no effect {why}; leave it out")


def json_option() -> Decorator:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def dry_run_option() -> Decorator:
    return click.option("--dry-run", is_flag=True, help="Print the plan and the bytes it needs; write nothing.")
