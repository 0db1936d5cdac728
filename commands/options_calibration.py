"""Options of commands that calibrate in their own pass or read stored statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .options import SEED

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def text_only_option() -> Decorator:
    """--text-only."""
    return click.option(
        "--text-only", is_flag=True, help="--text alone; by default half as many windows of bundled text go with it."
    )


def calibration_options() -> Decorator:
    """--text, --text-only, --evaluation, --context, --windows, --seed, --statistics, --propagate."""
    options = (
        click.option("--text", "texts", multiple=True, help="Calibration text: file, folder or `default`; repeatable."),
        text_only_option(),
        click.option("--evaluation", multiple=True, help="Text that must not overlap; default: the bundled one."),
        click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 (demo), else 2048."),
        click.option("--windows", type=click.IntRange(1), default=256, show_default=True, help="Windows at most."),
        click.option("--seed", type=SEED, default=0, show_default=True),
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
