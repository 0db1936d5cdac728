"""`mmquant eval`: score artifacts against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmquant.errors import GateError

from ..runs.sizes import check_output
from .options import SEED, device_option, json_option
from .options_fetch import fetch_options

FILE = click.Path(path_type=Path)


@click.command(short_help="Perplexity, KL divergence and agreement with the reference.")
@click.argument("artifacts", nargs=-1, metavar="ARTIFACT...")
@click.option("--reference", help="Model to compare with: folder, hf:, ms: or demo.")
@click.option("--text", "texts", multiple=True, help="File or folder, [DOMAIN=]PATH; default: the bundled texts.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next; default: the context.")
@click.option("--windows", type=click.IntRange(1), help="Windows in all; default 64 for the demo, else 128.")
@click.option("--convention", type=click.Choice(["all", "llama.cpp"]), default="all", show_default=True)
@click.option(
    "--activations",
    type=click.Choice(["exact", "llama.cpp"]),
    help="llama.cpp: rounded as its CPU backend rounds them; default with --convention llama.cpp, else exact.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of matrix products; default: bf16 on CUDA.")
@click.option("--floor", is_flag=True, help="Also the reference against itself in the other dtype.")
@click.option("--save-reference", "save", type=FILE, help="Store the reference's distributions in this file.")
@click.option("--reference-logits", "logits", type=FILE, help="Take them from such a file.")
@click.option("--engine", type=click.Choice(["mmquant", "llama.cpp", "vllm"]), default="mmquant", show_default=True)
@click.option("--max-ppl-ratio", type=float, help="Gate: PPL over the reference's.")
@click.option("--max-kld", type=float, help="Gate: mean KLD in nats.")
@click.option("--gate", "gate_file", type=FILE, help="Gates in a YAML or JSON file (docs/eval.md).")
@click.option("--html", type=FILE, help="Write a report with plots.")
@click.option("--state", type=FILE, help="Folder in which an interrupted run leaves what it has.")
@click.option("--batch-tokens", type=click.IntRange(1), help="Tokens that go through a layer at once.")
@device_option()
@fetch_options()
@json_option()
def command(
    artifacts: tuple[str, ...], gate_file: Path | None, as_json: bool, html: Path | None, **options: Any
) -> None:
    """Score artifacts (folders in any format mmquant reads, GGUF files) against a reference, in one streamed pass.

    A failed gate ends with exit code 4; positions that are not finite always fail.

    Example: mmquant eval ./m27-int4 ./m27.gguf --reference demo --json
    """
    import json

    from ..calibration.model.distributed import leave
    from ..runs.evaluation.result import apply_gate, check_gate, read_gate, table, validate
    from ..runs.evaluation.run import record, run

    if html is not None:
        from ..runs.evaluation.report import check_plots

        check_plots("--html")
    for option, path in (("--html", html), ("--save-reference", options["save"])):
        check_output(option, path)
    thresholds = read_gate(gate_file) if gate_file is not None else {}
    named = {"max_ppl_ratio": options.pop("max_ppl_ratio"), "max_kld": options.pop("max_kld")}
    thresholds |= check_gate({k: v for k, v in named.items() if v is not None}, "gate")
    try:
        result = run(artifacts, **options)
    finally:
        leave()
    if result is None:
        return
    failed = apply_gate(result, thresholds)
    validate(result)
    if html is not None:
        from ..runs.evaluation.report import write_report

        write_report(html, result)
    click.echo(json.dumps(result, indent=1, allow_nan=False) if as_json else table(result))
    record(artifacts, result)  # last: another process may hold the folder, and the result must not be lost by that
    if failed is not None:
        raise GateError(f"quality gate: {failed}")
