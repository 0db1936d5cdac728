"""`mmquant awq`: the same as `int4 --method awq --format awq`."""

from __future__ import annotations

import copy

import click

from ..runs.options import PLAN_FIELDS, Int4Options
from .int4 import command as int4

FIXED = {"method": "awq", "format": "awq", "backend": "mmquant"}
HELD = ("asymmetric", "eight_bit", "kv_cache", *PLAN_FIELDS)  # fixed by AWQ's format
CHOICES = {"effort": ("default", "high"), "attention": ("bf16", "int4")}  # those that differ here
HELP = {"effort": "high adds error feedback to AWQ's scales."}


def _command() -> click.Command:
    """The int4 command with its method and format given, and without the options that these decide."""

    def callback(**options: object) -> None:
        assert int4.callback is not None
        int4.callback(**FIXED, **held, **options)

    defaults = Int4Options()
    held = {name: getattr(defaults, name) for name in HELD}
    parameters = [_of_awq(p) for p in int4.params if p.name not in (*FIXED, *HELD)]
    text = "Write AWQ (GEMM, asymmetric) for vLLM and SGLang.\n\nExample: mmquant awq --model demo --out ./demo-awq"
    return click.Command("awq", params=parameters, callback=callback, help=text)


def _of_awq(parameter: click.Parameter) -> click.Parameter:
    """An option of int4 as awq has it: with the choices and the help that are true here."""
    name = parameter.name or ""
    if name not in CHOICES:
        return parameter
    option = copy.copy(parameter)
    assert isinstance(option, click.Option)
    option.type, option.help = click.Choice(CHOICES[name]), HELP.get(name, option.help)
    return option


command = _command()
