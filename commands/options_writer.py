"""The options of every command that writes an artifact, in the order of its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .options import Decorator, dry_run_option, fresh_option, model_option, options_of, out_option, result_json_option
from .options_backend import backend_option
from .options_fetch import fetch_options


def writer_options(options: type[Any], *, repeat: str | None = None, backend: bool = False) -> Decorator:
    """--model, --out, the options of a class of options in runs/, and what all writers take.

    The command gets model, out, options, device, fetch and dry_run. repeat: as of `options_of`. backend: --backend too.
    """
    parts = [model_option(), out_option(), options_of(options, repeat=repeat), *([backend_option()] if backend else [])]
    parts += [fetch_options(), fresh_option(), dry_run_option(), result_json_option()]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for part in reversed(parts):
            function = part(function)
        return function

    return decorate
