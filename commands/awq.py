"""`mmquant awq`: the same as `int4 --method awq --format awq`."""

from __future__ import annotations

import click

from ..runs.options import PLAN_FIELDS, PlannedOptions
from .int4 import command as int4

FIXED = {"method": "awq", "format": "awq", "backend": "mmquant"}
UNPLANNED = PlannedOptions()  # AWQ's format has one width


def _command() -> click.Command:
    """The int4 command with its method and format given."""

    def callback(**options: object) -> None:
        assert int4.callback is not None
        int4.callback(**FIXED, **unplanned, **options)

    unplanned = {name: getattr(UNPLANNED, name) for name in PLAN_FIELDS}
    parameters = [p for p in int4.params if p.name not in (*FIXED, *PLAN_FIELDS)]
    text = "Write AWQ (GEMM, asymmetric) for vLLM and SGLang.\n\nExample: mmquant awq --model demo --out ./demo-awq"
    return click.Command("awq", params=parameters, callback=callback, help=text)


command = _command()
