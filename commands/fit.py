"""`mmquant fit`: what fits where."""

from __future__ import annotations

import click

from ..runs.options_use import FitOptions
from .options import DEFAULT_MODEL, json_option, options_of
from .terminal import print_result


@click.command()
@click.argument("artifact", required=False)
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="Model, or its config.json; M2.7 needs no network."
)
@options_of(FitOptions, device=False)
@json_option()
def command(artifact: str | None, model: str, options: FitOptions, as_json: bool) -> None:
    """Which types fit which machine: bytes, context, placement, speed bound, and the commands that start them.

    From config.json alone (M2.7 without a network), or for ARTIFACT, a finished folder, a GGUF file or a repository
    (hf:ORG/NAME, of GGUF files hf:ORG/NAME:TYPE), by its headers.
    Exit code 5 when nothing fits.

    Example: mmquant fit --gpu 24GB --ram 96GB

    Example: mmquant fit --target 24GB+96GB --type IQ3_XXS --context 32768
    """
    import json

    from ..runs.fit import fit
    from .options import refuse_without_effect

    if artifact is not None:
        refuse_without_effect("with ARTIFACT, which says what it is", "model", "type")
    found = fit(artifact, options, model=model)
    print_result(json.dumps(found.to_dict()) if as_json else "\n".join(found.lines()), as_json)
    if found.refusal is not None:
        raise found.refusal
