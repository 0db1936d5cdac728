"""`mmquant run`: every variant of a recipe in one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.errors import GateError, InputError

from .options import DEFAULT_MODEL, device_option, dry_run_option, first_process, json_option, refuse_without_effect
from .options_fetch import FETCHED, fetch_options
from .terminal import print_result

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

RUN = ("out", "replace", "device", "dry_run", "as_json", *FETCHED)  # of a run itself
PURPOSES = ("publisher", "2xa100", "24gb")


@click.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; each variant has its own in it.")
@click.option("--init", is_flag=True, help="Print a commented recipe, or write it to RECIPE.")
@click.option("--for", "purpose", type=click.Choice(PURPOSES), help="What the recipe of --init is for.")
@click.option("--replace", is_flag=True, help="Make finished artifacts again that the recipe now asks for otherwise.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes.")
@device_option()
@fetch_options()
@dry_run_option()
@json_option()
def command(
    recipe: Path | None,
    out: Path | None,
    init: bool,
    purpose: str | None,
    replace: bool,
    schema: bool,
    device: str,
    fetch: FetchOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Pull each layer once, and make every variant of RECIPE of it; score and publish them as the recipe says.

    Run again it continues; what the recipe asks for otherwise is made again.

    Example: mmquant run recipe.yaml --out ./m27
    """
    if schema or init:
        why = "with --schema, which prints it alone" if schema else "with --init, which only writes a recipe"
        refuse_without_effect(why, *RUN, *(("recipe", "init", "purpose") if schema else ()))
    if schema:
        from ..runs.recipe.schema import recipe_schema

        click.echo(json.dumps(recipe_schema(), indent=1))
        return
    if init:
        begin_recipe(recipe, purpose)
        return
    refuse_without_effect("without --init", "purpose")
    if recipe is None or out is None:
        raise InputError(f"{'RECIPE' if recipe is None else '--out'} is missing, expected mmquant run RECIPE --out DIR")
    from ..runs.run import run

    made = run(recipe, out, device=device, fetch=fetch, replace=replace, dry_run=dry_run)
    if first_process():
        print_result(json.dumps(made.to_dict(), indent=1) if as_json else "\n".join(made.lines()), as_json)
    if made.refusal is not None:
        raise made.refusal
    if made.failure is not None:
        raise GateError(made.failure)


def begin_recipe(path: Path | None, purpose: str | None) -> None:
    """Print a recipe, or write it into a file that is not there yet."""
    from ..convert.files.atomic import write_whole
    from ..runs.recipe.templates import template

    text = template(purpose, DEFAULT_MODEL, path.name if path is not None else "recipe.yaml")
    if path is None:
        click.echo(text, nl=False)
        return
    if path.exists():
        raise InputError(f"{path}: exists, expected a new file for the recipe")
    write_whole(path, text.encode())
    click.echo(str(path))
