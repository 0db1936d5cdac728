"""mmquant doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmquant.errors import GateError, InputError

from .options import device_option, json_option

if TYPE_CHECKING:
    from torch import Tensor

    from ..convert.gguf.doctor import Finding
    from ..convert.gguf.reader import GgufSource

FILE = click.Path(path_type=Path)


@click.command(short_help="Finds and cures what breaks a GGUF file.")
@click.argument("file", type=FILE)
@click.option("--statistics", type=FILE, help="What `mmquant calibrate --out` wrote: its maxima show what overflows.")
@click.option("--text", "texts", multiple=True, help="Measure by running this text (or `default`) through the file.")
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True, help="Windows at most, for --text.")
@click.option("--context", type=click.IntRange(2), help="Tokens in a window; default 512 for the demo, else 2048.")
@click.option("--fix", is_flag=True, help="Rescale the experts that overflow, exactly.")
@click.option("--out", type=FILE, help="Folder for the fixed copy; default: FILE's folder with -fixed appended.")
@click.option("--in-place", is_flag=True, help="Fix the file itself instead of a copy.")
@device_option()
@json_option()
def command(
    file: Path,
    statistics: Path | None,
    fix: bool,
    out: Path | None,
    in_place: bool,
    device: str,
    as_json: bool,
    **text: Any,
) -> None:
    """Look for float16 overflow on CUDA, dead or non-finite experts and wrong metadata in any minimax-m2 GGUF.

    Exit code 4 when something is found that gives wrong results and is not cured by --fix.

    Example: mmquant doctor ./m27-gguf/demo-Q4_K_M.gguf --text default --fix
    """
    from ..convert.gguf.doctor import check_metadata, check_overflow, check_tensors, exponents
    from ..convert.gguf.reader import GgufSource

    source = GgufSource(file)
    source.validate()
    if fix and statistics is None and not text["texts"]:
        raise InputError("--fix: needs --statistics or --text to know which experts overflow")
    sums = measure(source, statistics, text, device)
    faults = check_metadata(source) + check_tensors(source) + check_overflow(source, sums)
    written: list[Path] = []
    cures = exponents(sums) if sums is not None else {}
    if fix and cures:
        written, cures, left = cure(source, cures, out, in_place)
        faults = [fault for fault in faults if "float16 ends" not in fault.text] + left
    report(source, faults, cures if fix else {}, written, sums, as_json)
    errors = [fault for fault in faults if fault.level == "error"]
    if errors:
        raise GateError(f"{file}: {errors[0].where}: {errors[0].text} ({len(errors)} errors)")


def measure(source: GgufSource, statistics: Path | None, text: dict[str, Any], device: str) -> Tensor | None:
    """[L, E] largest sums of inputs of w2, from statistics (always of 32) or from text; None without either."""
    import torch

    if statistics is not None:
        from ..calibration.statistics.store import open_statistics

        stored = open_statistics(statistics)
        if stored.layers < source.geometry.layers:
            raise InputError(f"{statistics}: {stored.layers} layers, the file has {source.geometry.layers}")
        layers = (stored.layer(layer, second=False) for layer in range(source.geometry.layers))
        sums = torch.stack([layer.expert_mid.sum32 for layer in layers])
        if sums.shape[1] != source.geometry.experts:
            raise InputError(f"{statistics}: {sums.shape[1]} experts, the file has {source.geometry.experts}")
        return sums
    if not text["texts"]:
        return None
    from ..calibration.gguf.maxima import largest_sums
    from ..convert.gguf.doctor import summed
    from .calibrate import make_corpus

    corpus = make_corpus(source, {"evaluation": (), "seed": 0, **text})  # type: ignore[arg-type]
    return largest_sums(
        source, corpus.tokens, device, [summed(source, layer) for layer in range(source.geometry.layers)]
    )


def cure(
    source: GgufSource, cures: dict[tuple[int, int], int], out: Path | None, in_place: bool
) -> tuple[list[Path], dict[tuple[int, int], int], list[Finding]]:
    """Write the fixed model: its files, what was cured, what was left alone. Refuses to write over something else."""
    from ..convert.gguf.doctor import apply_fix, plan_fix

    first = source.files[0].path
    if in_place and out is not None:
        raise InputError("--in-place and --out: choose one")
    target = None if in_place else out or first.parent.with_name(first.resolve().parent.name + "-fixed")
    for file in source.files:
        if target is not None and (target / file.path.name).exists():
            raise InputError(f"{target / file.path.name}: exists, expected a new place")
    patches, done, left = plan_fix(source, cures)
    return apply_fix(source, patches, target) if patches else [], done, left


def report(
    source: GgufSource,
    faults: list[Finding],
    cures: dict[tuple[int, int], int],
    written: list[Path],
    sums: Tensor | None,
    as_json: bool,
) -> None:
    """What was found and done, on stdout."""
    from ..convert.gguf.doctor import FP16_MAX

    if as_json:
        import dataclasses
        import json

        document = {
            "file": source.label,
            "findings": [dataclasses.asdict(fault) for fault in faults],
            "cured": [{"layer": layer, "expert": expert, "power": k} for (layer, expert), k in cures.items()],
            "written": [str(path) for path in written],
            "largest_sum32": None if sums is None else float(sums.max()),
        }
        click.echo(json.dumps(document, indent=1))
        return
    for fault in faults:
        experts = f" (experts {', '.join(map(str, fault.experts))})" if fault.experts else ""
        click.echo(f"{fault.level}: {fault.where}: {fault.text}{experts}")
    for (layer, expert), power in cures.items():
        after = (
            ""
            if sums is None
            else f", largest sum {float(sums[layer, expert]):.4g} -> {float(sums[layer, expert]) / 2**power:.4g}, "
            f"{FP16_MAX * 2**power / float(sums[layer, expert]):.1f} times below 65504"
        )
        click.echo(f"cured: layer {layer} expert {expert}: up / 2^{power}, down * 2^{power}{after}")
    for path in written:
        click.echo(str(path))
    if not faults and not cures:
        click.echo(f"{source.label}: nothing found")
