"""`mmquant eval`: score artifacts against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmquant.errors import GateError

from ..runs.options_use import EvalOptions
from .options import json_option, options_of, refuse_without_effect
from .options_fetch import fetch_options
from .terminal import print_result

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("artifacts", nargs=-1, metavar="ARTIFACT...")
@click.option("--reference", help="Model to compare with: folder, hf:, ms: or demo.")
@options_of(EvalOptions)
@click.option("--max-ppl-ratio", type=float, help="Gate: PPL over the reference's.")
@click.option("--max-kld", type=float, help="Gate: mean KLD in nats.")
@click.option("--gate", "gate_file", type=FILE, help="Gates in a YAML or JSON file (docs/eval.md).")
@click.option("--dry-run", is_flag=True, help="Only what would be run, and its memory.")
@click.option("--html", type=FILE, help="Write a report (with plots, if matplotlib is installed).")
@fetch_options()
@json_option()
def command(
    artifacts: tuple[str, ...],
    reference: str | None,
    options: EvalOptions,
    max_ppl_ratio: float | None,
    max_kld: float | None,
    gate_file: Path | None,
    dry_run: bool,
    html: Path | None,
    device: str,
    fetch: FetchOptions,
    as_json: bool,
) -> None:
    """Score artifacts (folders in any format mmquant reads, GGUF files) against a reference, in one streamed pass.

    A failed gate ends with exit code 4; positions that are not finite always fail.

    Example: mmquant eval ./m27-int4 ./m27.gguf --reference demo --json
    """
    import json

    from ..runs.evaluation.plan import plan_evaluation
    from ..runs.evaluation.result import read_gate
    from ..runs.evaluation.run import evaluate
    from ..runs.output import check_output

    if not options.floor:
        refuse_without_effect("without --floor", "floor_runs")
    if dry_run:
        planned = plan_evaluation(artifacts, reference, options, device=device, fetch=fetch)
        print_result(json.dumps(planned.to_dict(), indent=1) if as_json else planned.table(), as_json)
        return
    check_output("--html", html)
    gates = read_gate(gate_file) if gate_file is not None else {}
    named = {"max_ppl_ratio": max_ppl_ratio, "max_kld": max_kld}
    gates |= {name: limit for name, limit in named.items() if limit is not None}
    found = evaluate(artifacts, reference, options, gates=gates, device=device, fetch=fetch)
    if found is None:
        return
    if html is not None:
        found.write_html(html)
    print_result(json.dumps(found.to_dict(), indent=1, allow_nan=False) if as_json else found.table(), as_json)
    found.record()  # last: another process may hold the folder, and the result must not be lost by that
    if found.failure is not None:
        raise GateError(f"quality gate: {found.failure}")
