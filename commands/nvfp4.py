"""`mmquant nvfp4`: write an NVFP4 folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..runs.options import Nvfp4Options
from .options import begin, refuse_idle_plan, refuse_idle_text, show
from .options_writer import writer_options

if TYPE_CHECKING:
    from ..convert.hub.store import FetchOptions


@click.command()
@writer_options(Nvfp4Options)
def command(model: str, out: Path, options: Nvfp4Options, device: str, fetch: FetchOptions, dry_run: bool) -> None:
    """Write NVFP4 experts (E2M1, a scale per 16 inputs) for vLLM, SGLang and TensorRT-LLM, calibrated in the same pass.

    Weights only (W4A16) unless --activations nvfp4. Runs on Blackwell, and through Marlin on A100 and H100.

    Example: mmquant nvfp4 --model demo --out ./demo-nvfp4
    """
    refuse_idle_text(options)
    refuse_idle_plan(options, "attention")
    from ..runs.fp4 import quantize_nvfp4

    begin(out, dry_run)
    show(quantize_nvfp4(model, out, options, device=device, fetch=fetch, dry_run=dry_run))
