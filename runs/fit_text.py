"""Lines of `mmquant fit` for people."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmquant.tables import GIB, gib
from mmquant.tables import table as aligned

from ..convert.fitting.commands import Command, override_tensor
from ..convert.fitting.verdict import NO, TIGHT, YES, Fit

if TYPE_CHECKING:
    from ..convert.fitting.targets import Target
    from ..convert.models.geometry import Geometry

PARTS = ("usable", "weights", "kv", "compute", "staging", "runtime", "margin")


NEAREST = 5  # types that do not fit and are named all the same


def _gibibytes(size: int) -> str:
    return f"{size / GIB:.2f}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.{1 if size >= 10**9 else 4}f}"


def _count(weights: int) -> str:
    return f"{weights / 1e9:.4g} G" if weights >= 10**9 else f"{weights / 1e6:.4g} M"


def machine_words(target: Target) -> str:
    """Cards and RAM of a machine."""
    ram = f"{target.ram / GIB:.0f} GiB"
    if target.unified:
        return f"{ram} unified memory ({target.name})"
    if target.cards is None:
        return f"{ram} RAM"
    return f"{target.cards.count} x {target.cards.name} ({target.cards.memory / GIB:.0f} GiB), {ram} RAM"


def placement_words(fit: Fit) -> str:
    """Where it lies, in an engine's own options."""
    place = fit.placement
    if place.engine == "vllm":
        return f"TP {place.tensor_parallel}" + (" + EP" if place.expert_parallel else "")
    words = [f"--n-cpu-moe {place.cpu_layers}"] if place.cpu_layers else []
    words += ["-ts " + ",".join(map(str, place.split))] if place.split else []
    return " ".join(words) or "all in one place"


def context_words(context: int) -> str:
    """65536 -> 64K."""
    return f"{context // 1024}K" if context % 1024 == 0 else f"{context:,}"


def detail(fit: Fit, g: Geometry, commands: list[Command], made_by: list[str]) -> list[str]:
    """One type on one machine: devices line by line, verdict, commands."""
    weights = fit.weights
    bits = 8 * weights.total / g.parameters
    lines = [f"{fit.row.id}: {weights.total:,} bytes ({_gigabytes(weights.total)} GB), {bits:.2f} bits per weight"]
    lines.append(f"{fit.target.id}: {machine_words(fit.target)}")
    if fit.placement.devices:
        head = ["GiB", *PARTS]
        rows = [[d.name, *(_gibibytes(int(getattr(d, part))) for part in PARTS)] for d in fit.placement.devices]
        lines += aligned(head, rows, text=("GiB",))
    if fit.verdict == NO:
        missing = fit.reason or f"{fit.missing:,} bytes ({gib(fit.missing)}) are missing"
        return [*lines, f"fits: no; {missing}"]
    free = "" if fit.verdict == YES else ", less than 1 GiB free"
    lines.append(f"fits: {fit.verdict}{free}; context {fit.context:,} tokens, {fit.placement.cache} cache")
    lines.append(f"placement: {fit.placement.engine}, {placement_words(fit)}")
    if override := override_tensor(fit):
        lines.append(f"the same as -ot: '{override}'")
    lines.append(f"decode: at most {fit.tokens_per_second:.0f} tokens/s (estimated: memory bandwidth alone)")
    if made_by:
        lines += ["made by:", f"    {shlex.join(made_by)}"]
    for command in commands:
        lines.append(f"{command.engine}{f' ({command.note})' if command.note else ''}:")
        lines.append(f"    {command.line}")
    return lines


def table(model: str, g: Geometry, fits: tuple[Fit, ...]) -> list[str]:
    """Many: one row per type on one machine, one row per machine for one type, else each type's smallest machines."""
    targets = {fit.target.id: fit.target for fit in fits}
    types = list(dict.fromkeys(fit.row.id for fit in fits))
    active = f"{_count(g.parameters)} weights, {_count(g.active_parameters)} active"
    lines = [f"{model}: {active}, {g.layers} layers x {g.experts} experts"]
    if len(targets) == 1 or len(types) == 1:
        return [*lines, *_one_axis(g, fits, targets, len(targets) == 1)]
    head = ["type", "GB", "bits", "machines"]
    rows: list[list[str]] = []
    for name in types:
        own = [fit for fit in fits if fit.row.id == name]
        size = own[0].weights.total
        where = ", ".join(f"{f.target.id} {context_words(f.context)}" for f in smallest(own)) or "none"
        rows.append([name, _gigabytes(size), f"{8 * size / g.parameters:.2f}", where])
    return [
        *lines,
        *aligned(head, rows, text=("type", head[-1])),
        "--target ID, or --gpu and --ram, tell all of one machine.",
    ]


def _one_axis(g: Geometry, fits: tuple[Fit, ...], targets: dict[str, Target], one: bool) -> list[str]:
    first = next(iter(targets.values()))
    lines = [f"{first.id}: {machine_words(first)}"] if one else [_size_line(fits[0], g)]
    head = ["type", "GB", "bits"] if one else ["machine", "RAM GiB"]
    head += ["fits", "context", "free GiB", "tok/s <=", "placement"]
    rows: list[list[str]] = []
    order = {YES: 0, TIGHT: 1, NO: 2}
    ordered = sorted(fits, key=lambda f: (order[f.verdict], bool(f.reason), f.missing, -f.weights.total))
    fitting = sum(f.verdict != NO for f in fits)
    shown = ordered[: fitting or NEAREST] if one else fits
    for f in shown:
        size = f.weights.total
        own = [f.row.id, _gigabytes(size), f"{8 * size / g.parameters:.2f}"]
        own = own if one else [f.target.id, f"{f.target.ram / GIB:.0f}"]
        if f.verdict == NO:
            rows.append([*own, "no", "-", "-", "-", f.reason or f"{gib(f.missing)} missing"])
            continue
        speed = f"{f.tokens_per_second:.0f}"
        cells = [f.verdict, context_words(f.context), _gibibytes(f.placement.margin), speed, placement_words(f)]
        rows.append([*own, *cells])
    words = ("type", "machine", "fits", "placement")
    lines += aligned(head, rows, text=words)
    lines += _left_out(ordered[len(shown) :])
    return [*lines, "tok/s: a bound by memory bandwidth alone, estimated."]


def _left_out(fits: Sequence[Fit]) -> list[str]:
    """What of one machine's types is not in its table: the nearest misses, and how many are not for it at all."""
    short = [fit for fit in fits if not fit.reason]
    lines = []
    if short:
        nearest = ", ".join(f"{fit.row.id} {gib(fit.missing)}" for fit in short[:NEAREST])
        lines.append(f"do not fit: {len(short)} types; least is missing for {nearest}")
    for reason, count in Counter(fit.reason for fit in fits if fit.reason).items():
        lines.append(f"do not fit: {count} types, {reason}")
    return [*lines, "--type NAME tells all of one type, --json of every type."] if lines else []


def _size_line(fit: Fit, g: Geometry) -> str:
    size = fit.weights.total
    return f"{fit.row.id}: {_gigabytes(size)} GB, {8 * size / g.parameters:.2f} bits per weight"


def smallest(fits: list[Fit]) -> list[Fit]:
    """The machines that hold a type and than which none that does is smaller in cards and in RAM."""
    held = [fit for fit in fits if fit.verdict == YES] or [fit for fit in fits if fit.verdict != NO]
    sizes = {fit.target.id: _sizes(fit.target) for fit in held}

    def beaten(fit: Fit) -> bool:
        own = sizes[fit.target.id]
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in sizes.values())

    return [fit for fit in held if not beaten(fit)]


def _sizes(target: Target) -> tuple[int, int]:
    """Bytes of cards and of RAM; unified memory is card memory of which nothing else is needed."""
    if target.unified:
        return target.ram, 0
    return (target.cards.count * target.cards.memory if target.cards else 0), target.ram
