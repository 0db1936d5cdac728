"""The option --backend, for commands that llm-compressor can do as well."""

from __future__ import annotations

import click

from .options import Decorator


def backend_option() -> Decorator:
    """--backend, of the commands that llm-compressor can do as well."""
    return click.option(
        "--backend",
        type=click.Choice(["mmquant", "llmcompressor"]),
        default="mmquant",
        show_default=True,
        help="llmcompressor: its model_free_ptq on a local folder, in the Python that MMQUANT_LLMCOMPRESSOR names.",
    )
