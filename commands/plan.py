"""`mmquant plan`: choose types for a size or a machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import PlanOptions
from .options import TEXT, json_option, model_option, options_of, out_option, refuse_without_effect
from .options_fetch import fetch_options
from .terminal import print_result

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@model_option()
@out_option()
@options_of(PlanOptions)
@fetch_options()
@click.option("--explain", is_flag=True, help="Also what every matrix got, and what the next type would change.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the plan to this file (needs matplotlib).")
@json_option()
def command(
    model: str,
    out: Path,
    options: PlanOptions,
    device: str,
    fetch: FetchOptions,
    explain: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Choose a type for every matrix, so that the predicted distance to the original is least within a budget.

    For int4, nvfp4 and mxfp4 it chooses which layers' experts and attention stay wider, for mlx a width for each
    module. What each type costs is measured on the model, once, and kept as sensitivity.json in --out. The plan is
    plan.json there; `--plan` of the command that --format names writes it.

    Example: mmquant plan --model demo --size 7MB --out ./demo-plan
    """
    import json

    from ..runs.plan import plan

    if options.sensitivity is not None:
        refuse_without_effect("with --sensitivity, which stands for the text", *TEXT, "judged_windows")
    if not options.text:
        refuse_without_effect("without --text", "text_only")
    if options.target is None:
        refuse_without_effect("without --target", "target_context")
    if options.format in ("gguf", "mlx"):
        refuse_without_effect(f"with --format {options.format}, which no cards share", "tp")
    elif options.target is not None:
        refuse_without_effect("with --target, which says how many cards there are", "tp")
    found = plan(model, out, options, device=device, fetch=fetch)
    if plot is not None:
        found.plot(plot)
    print_result(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(found.lines(explain)), as_json)
