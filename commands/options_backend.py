"""The option --backend, for commands that llm-compressor can do as well."""

from __future__ import annotations

from typing import Any

import click


def backend_option() -> Any:
    """--backend, of the commands that llm-compressor can do as well."""
    return click.option(
        "--backend",
        type=click.Choice(["mmquant", "llmcompressor"]),
        default="mmquant",
        show_default=True,
        help="llmcompressor: its model_free_ptq on a local folder, in the Python that MMQUANT_LLMCOMPRESSOR names.",
    )
