"""Options of commands that calibrate in their own pass, or read what `calibrate --out` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import InputError

if TYPE_CHECKING:
    from ..calibration.statistics.provider import Provider
    from ..convert.checkpoints.checkpoint import Checkpoint

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
NAMES = ("texts", "evaluation", "context", "windows", "seed", "statistics", "propagate")


def calibration_options() -> Decorator:
    """--text, --evaluation, --context, --windows, --seed, --statistics, --propagate."""
    options = (
        click.option("--text", "texts", multiple=True, help="Calibration text: file, folder or `default`; repeatable."),
        click.option("--evaluation", multiple=True, help="Text that must not overlap; default: the bundled one."),
        click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 (demo), else 2048."),
        click.option("--windows", type=click.IntRange(1), default=256, show_default=True, help="Windows at most."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
        click.option("--statistics", type=click.Path(path_type=Path), help="What `calibrate --out` wrote."),
        click.option(
            "--propagate",
            type=click.Choice(["reference", "quantized"]),
            help="What the next layer's calibration sees; default: reference, with --effort high quantized.",
        ),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def make_provider(
    source: Checkpoint, options: dict[str, Any], device: str, folder: Path, hidden: bool, full: bool = True
) -> Provider:
    """A live pass over the calibration text, or the stored statistics of --statistics.

    folder keeps the stream of a quantized pass between layers, so that a killed run continues.
    hidden: the quantizer needs the tokens themselves, which stored statistics cannot give (InputError).
    full: it needs second moments; otherwise diagonals are collected, and stored ones will do.
    """
    from ..calibration.statistics.collector import Collect
    from ..calibration.statistics.live import LivePass, PassOptions, StoredPass, default_dtype

    propagate = options["propagate"] or ("quantized" if hidden else "reference")
    chosen = PassOptions(Collect(full), propagate, device, default_dtype(device))
    if options["statistics"] is None:
        from .calibrate import make_corpus

        return LivePass(
            source,
            make_corpus(source, options),
            chosen,
            hidden=hidden,
            folder=folder if propagate == "quantized" else None,
        )
    if hidden or propagate == "quantized":
        what = "--effort high" if hidden else "--propagate quantized"
        raise InputError(f"{what} needs the calibration tokens, --statistics holds only sums")
    from ..calibration.statistics.store import open_statistics

    stored = open_statistics(options["statistics"])
    if full and not stored.full:
        raise InputError(
            f"{options['statistics']}: holds diagonals, expected second moments (calibrate --moments full)"
        )
    return StoredPass(source, stored, chosen)
