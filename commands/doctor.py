"""`mmquant doctor`: check and repair a GGUF file, check a quantized folder."""

from __future__ import annotations

import click

from mmquant.errors import GateError

from ..runs.options_use import DoctorOptions
from .options import json_option, options_of, refuse_without_effect
from .terminal import print_result


@click.command()
@click.argument("file")
@options_of(DoctorOptions)
@json_option()
def command(file: str, options: DoctorOptions, device: str, as_json: bool) -> None:
    """Look for float16 overflow on CUDA, dead or non-finite experts and wrong metadata in any minimax-m2 GGUF.

    Of a quantized folder (INT4, NVFP4 ...): what engines read wrongly, among it NVFP4 blocks that A100 and H100 lose.

    FILE may be hf:ORG/NAME:TYPE as well: its parts are fetched, and deleted in the end (no --fix then).

    Exit code 4 when something is found that gives wrong results and is not repaired by --fix.

    Example: mmquant doctor ./demo-gguf/demo-Q4_K_M.gguf --text default --fix
    """
    import json

    from ..runs.doctor import doctor

    if not options.text:
        refuse_without_effect("without --text", "windows", "context")
    if not options.fix:
        refuse_without_effect("without --fix", "out", "in_place")
    found = doctor(file, options, device=device)
    print_result(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines()), as_json)
    if found.errors:
        first = found.errors[0]
        raise GateError(f"{file}: {first.where}: {first.text} ({len(found.errors)} errors)")
