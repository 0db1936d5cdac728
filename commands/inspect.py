"""`mmquant inspect`: show the census of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from .options import json_option


@click.command(short_help="What is in a checkpoint.")
@click.argument("model")
@json_option()
def command(model: str, as_json: bool) -> None:
    """Census of MODEL: per kind the count, dtype, weights and bytes.

    MODEL is a folder in any format that eval reads, a GGUF file, demo, hf:ORG/NAME, ms:ORG/NAME, or hf:ORG/NAME:TYPE
    for a type of a GGUF repository (its files are fetched).

    Example: mmquant inspect demo
    """
    from ..convert.open import open_source
    from ..runs.models import say_notes

    source = open_source(model)
    source.validate()
    say_notes(source)
    census, g = source.census(), source.geometry
    total = sum(kind.bytes for kind in census)
    if as_json:
        kinds = [asdict(kind) for kind in census]
        data = {"model": model, "fingerprint": source.fingerprint, "geometry": asdict(g), "kinds": kinds}
        click.echo(json.dumps({**data, "bytes": total, "parameters": g.parameters}))
        return
    click.echo(
        f"{model}: {g.layers} layers, hidden {g.hidden}, {g.experts} experts of {g.expert_width} (top "
        f"{g.experts_per_token}), {g.heads}/{g.kv_heads} heads of {g.head_dim}, vocabulary {g.vocab}"
    )
    click.echo(f"{'kind':<16}{'dtype':<10}{'count':>8}{'weights':>18}{'bytes':>18}")
    for kind in census:
        click.echo(f"{kind.kind:<16}{kind.dtype:<10}{kind.count:>8,}{kind.weights:>18,}{kind.bytes:>18,}")
    click.echo(f"{'total':<16}{'':<10}{sum(k.count for k in census):>8,}{g.parameters:>18,}{total:>18,}")
