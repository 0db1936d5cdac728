"""`mmquant inspect`: show the census of a checkpoint."""

from __future__ import annotations

import click

from .options import json_option
from .terminal import print_result


@click.command()
@click.argument("model")
@json_option()
def command(model: str, as_json: bool) -> None:
    """Census of MODEL: per kind the count, dtype, weights and bytes.

    MODEL is a folder in any format that eval reads, a GGUF file, demo, hf:ORG/NAME, ms:ORG/NAME, or hf:ORG/NAME:TYPE
    for a type of a GGUF repository (its files are fetched).

    Example: mmquant inspect demo
    """
    import json

    from ..runs.inspect import inspect

    found = inspect(model)
    print_result(json.dumps(found.to_dict()) if as_json else "\n".join(found.lines()), as_json)
