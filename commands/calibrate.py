"""`mmquant calibrate`: collect and store every expert's statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import CalibrateOptions
from .options import (
    begin,
    dry_run_option,
    fresh_option,
    json_option,
    model_option,
    options_of,
    out_option,
    refuse_without_effect,
)
from .options_fetch import fetch_options
from .terminal import print_result

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@model_option()
@out_option()
@options_of(CalibrateOptions, skip=("text_only",))
@fetch_options()
@fresh_option()
@dry_run_option()
@json_option()
def command(
    model: str, out: Path, options: CalibrateOptions, device: str, fetch: FetchOptions, dry_run: bool, as_json: bool
) -> None:
    """Run calibration text through the model and keep, per expert, what every quantizer needs.

    Killed and run again it continues with the layer it was in; under torchrun the windows are split over the ranks.

    Example: mmquant calibrate --model demo --out ./stats --imatrix imatrix.gguf
    """
    import json

    from ..runs.calibrate import calibrate, plan_calibration
    from ..runs.output import check_output

    if options.moments == "diagonal":
        refuse_without_effect("with --moments diagonal, which is kept in float32", "store")
    if dry_run:
        plan = plan_calibration(model, out, options, device=device, fetch=fetch)
        print_result(json.dumps(plan.to_dict(), indent=1) if as_json else "\n".join(plan.lines()), as_json)
        if plan.refusal is not None:
            raise plan.refusal
        return
    check_output("--imatrix", options.imatrix)
    begin(out, dry_run)
    found = calibrate(model, out, options, device=device, fetch=fetch)
    if found is not None:
        document = json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else "\n".join(found.lines())
        print_result(document, as_json)
