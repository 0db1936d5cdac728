"""Plan a GGUF file for a size or a machine: measure once, choose exactly, write plan.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, InputError
from mmquant.monitor import Monitor, phase, watching
from mmquant.tables import table

from .corpus import context_of, make_corpus
from .models import Model, choose_device, opened
from .options import PlanOptions
from .plan_target import budgets_of
from .results import Result

if TYPE_CHECKING:
    from ..calibration.plan.allocate import Allocation
    from ..calibration.plan.sensitivity import Sensitivity
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions
    from ..convert.plan_file import PlanFile

PLAN, SENSITIVITY = "plan.json", "sensitivity.json"
KEYS = 1024  # bytes of a header that say which text a file was calibrated on, at most
CURVE = (0.8, 0.9, 0.95, 1.05, 1.1, 1.25)  # budgets of the alternatives, as shares of the asked one


@dataclass(frozen=True)
class Planned(Result):
    """A plan that was made: its file, and the sensitivities that it rests on."""

    path: Path
    plan: PlanFile
    sensitivity: Path

    def to_dict(self) -> dict[str, Any]:
        """The document of plan.json, and where it lies."""
        return {"path": str(self.path), **self.plan.to_dict()}

    def rows(self) -> list[dict[str, Any]]:
        """One row a matrix: type, bytes and predicted KLD."""
        why = self.plan.reasons
        return [
            {"tensor": name, "type": kind, "bytes": why[name].bytes, "kld": why[name].kld}
            for name, kind in self.plan.tensors.items()
        ]

    def lines(self, explain: bool = False) -> list[str]:
        """For people; explain: every matrix with its neighbours in size, too."""
        plan = self.plan
        head = (
            f"{self.path}: {plan.bytes:,} bytes, {plan.bits_per_weight:.3f} bits a weight, predicted KLD {plan.kld:.4f}"
        )
        found = [head, "", *table(("matrix", "types"), _by_role(plan.tensors))]
        curve = sorted([*((p.bytes, p.kld) for p in plan.curve), (plan.bytes, plan.kld)])
        found += ["", *table(("bytes", "predicted KLD"), [(f"{size:,}", f"{kld:.4f}") for size, kld in curve])]
        if plan.placement is not None:
            found += ["", *(f"{name}: {value:,}" for name, value in plan.placement.items())]
        return [*found, "", *self._explained()] if explain else found

    def _explained(self) -> list[str]:
        rows = []
        for name, kind in self.plan.tensors.items():
            why = self.plan.reasons[name]
            rows.append((name, kind, f"{1e3 * why.kld:.3f}", _change(why, why.smaller), _change(why, why.larger)))
        return table(("tensor", "type", "mKLD", "smaller", "larger"), rows)


def plan(
    model: Model,
    out: str | Path,
    options: PlanOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    monitor: Monitor | None = None,
) -> Planned:
    """Choose the type of every matrix for a size, bits a weight or a machine; plan.json goes into the folder `out`.

    What was measured is kept beside it (sensitivity.json) and used again; an interrupted measurement is continued.

    Raises InputError for options or files that will not do, FitError for a budget that nothing fits (it names the
    smallest that works).
    """
    from ..calibration.plan.sensitivity import read_sensitivity

    chosen, out = options or PlanOptions(), Path(out)
    asked(chosen)
    with watching(monitor), opened(model, fetch, out) as source:
        check_size(source, chosen)
        path = chosen.sensitivity or out / SENSITIVITY
        if chosen.sensitivity is None:
            measure_into(source, out, chosen, choose_device(device))
        found = read_sensitivity(path)
        found.check(path, source.fingerprint, source.geometry)
        made = make(source, found, chosen)
        out.mkdir(parents=True, exist_ok=True)
        made.write(out / PLAN)
        return Planned(out / PLAN, made, path)


def asked(options: PlanOptions) -> dict[str, Any]:
    """What was asked for. InputError unless it is one of size, bits and target."""
    given = {name: getattr(options, name) for name in ("size", "bits", "target") if getattr(options, name) is not None}
    if len(given) != 1:
        raise InputError(f"--size, --bits, --target: {len(given)} given, expected one of them")
    if "target" in given:
        given["context"] = options.target_context
    return given


def check_size(source: Checkpoint, options: PlanOptions) -> None:
    """FitError before anything is measured, where not even the smallest types fit."""
    from ..calibration.plan.groups import group_shapes, kinds_of
    from ..calibration.plan.sensitivity import Measured

    g = source.geometry
    nothing = {name: Measured(dict.fromkeys(kinds_of(name, s[-1]), 1.0), {}) for name, s in group_shapes(g).items()}
    solve(source, nothing, options)


def measure_into(source: Checkpoint, out: Path, options: PlanOptions, device: str) -> None:
    """Measure the model's sensitivity into sensitivity.json of `out`, unless that is there for this model and text."""
    from ..calibration.plan.measure import PROBES, Measurement
    from ..calibration.plan.resume import forget, keep, take_up
    from ..calibration.plan.sensitivity import Sensitivity, read_sensitivity
    from ..convert.files.lock import hold

    path, corpus = out / SENSITIVITY, make_corpus(source, options)
    chosen = judged_windows(corpus, source, options)
    text = {"fingerprint": corpus.fingerprint, "judged": chosen, "corpus": corpus.describe(), "probes": list(PROBES)}
    if path.exists():
        known = read_sensitivity(path)
        if known.model == source.fingerprint and known.text == text:
            return
        raise InputError(f"{path}: measured on another model or text; name it by --sensitivity, or take another --out")
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        rest = [i for i in range(len(corpus.tokens)) if i not in set(chosen)]
        pass_ = Measurement(source, corpus.tokens[rest], corpus.tokens[chosen], device, out)
        identity = hashlib.sha256(json.dumps([source.fingerprint, text, device]).encode()).hexdigest()
        layers, done = source.geometry.layers, take_up(out, identity, pass_)
        if done is None:
            pass_.begin()
        with phase("sensitivity", layers + 1, "step", done or 0) as bar:
            for number in range(done or 0, layers):
                pass_.layer(number)
                keep(out, identity, pass_, number + 1)
                bar.advance()
            groups = pass_.finish()
            bar.advance()
        domains = [corpus.domains[int(corpus.domain[i])] for i in chosen]
        Sensitivity(source.fingerprint, text, domains, groups).write(path)
        forget(out)


def judged_windows(corpus: Corpus, source: Checkpoint, options: PlanOptions) -> list[int]:
    """Windows that are left out of the calibration to judge by: evenly spaced, so of every domain. InputError."""
    count = options.judged_windows or (24 if context_of(source, options) <= 512 else 4)
    windows = len(corpus.tokens)
    if 2 * count > windows:
        raise InputError(f"--judged-windows {count}: the text has {windows} windows, expected twice as many")
    return [int((i + 0.5) * windows / count) for i in range(count)]


def solve(source: Checkpoint, groups: Any, options: PlanOptions) -> Allocation:  # noqa: ANN401
    """The best choice. FitError that names the smallest that works."""
    from ..calibration.plan.allocate import allocate, allocate_placed

    g, (fixed, headers) = source.geometry, fixed_bytes(source)
    if options.target is not None:
        card, host = budgets_of(options.target, g, options.target_context)
        if card is None:
            return allocate(g, groups, host - fixed)
        return allocate_placed(g, groups, card - fixed, host)
    budget = size_of(source, options)
    try:
        return allocate(g, groups, budget - fixed - headers)
    except FitError:
        from ..calibration.plan.allocate import options_of
        from ..calibration.plan.knapsack import smallest

        least = smallest(options_of(g, groups)) + fixed + headers
        word = "--bits" if options.bits is not None else "--size"
        raise FitError(f"{word}: {budget:,} bytes, the smallest file takes {least:,} ({least / 1e9:.3f} GB)") from None


def size_of(source: Checkpoint, options: PlanOptions) -> int:
    """Bytes of the file that --size or --bits allow."""
    if options.size is not None:
        return options.size
    assert options.bits is not None
    return int(options.bits * weights_of(source) / 8)


def weights_of(source: Checkpoint) -> int:
    """Weights of the model, all tensors of a GGUF file."""
    import math

    from ..convert.gguf.names import all_shapes

    return sum(math.prod(shape) for shape in all_shapes(source.geometry).values())


def fixed_bytes(source: Checkpoint) -> tuple[int, int]:
    """(bytes of tensors that have no choice: norms, routers; bytes of headers, with room for more keys)."""
    from ..calibration.plan.groups import group_shapes
    from ..convert.gguf.mixes import find_mix
    from ..convert.gguf.plan import make_plan
    from ..convert.gguf.variant import GgufVariant
    from ..convert.gguf.writer import padded

    whole = make_plan(source, GgufVariant(find_mix("Q4_K_M"), "planned", True), None)
    tensors = [tensor for step in whole.steps for tensor in step]
    data, chosen = sum(padded(tensor.bytes) for tensor in tensors), group_shapes(source.geometry)
    fixed = sum(padded(tensor.bytes) for tensor in tensors if tensor.name not in chosen)
    return fixed, whole.bytes - data + KEYS


def make(source: Checkpoint, found: Sensitivity, options: PlanOptions) -> PlanFile:
    """The plan, with its reasons and the curve of alternatives."""
    from ..calibration.plan.allocate import allocate
    from ..convert.gguf.mixes import data_bytes
    from ..convert.plan_file import PlanFile, Point

    best = solve(source, found.groups, options)
    curve = []
    for share in CURVE:
        try:
            other = allocate(source.geometry, found.groups, int(share * best.bytes))
        except FitError:
            continue
        curve.append(Point(data_bytes(source.geometry, other.types), other.kld))
    size = data_bytes(source.geometry, best.types)
    placement = None if best.host_layers is None else {"n_cpu_moe": best.host_layers}
    return PlanFile(
        "gguf",
        source.fingerprint,
        source.label,
        asked(options),
        size,
        8 * size / weights_of(source),
        best.kld,
        best.types,
        reasons_of(source, found, best),
        tuple(curve),
        placement,
        str(found.text.get("fingerprint", "")),
    )


def reasons_of(source: Checkpoint, found: Sensitivity, best: Allocation) -> dict[str, Any]:
    """By tensor, what its type costs and what its neighbours would."""
    from ..calibration.plan.allocate import options_of
    from ..convert.plan_file import Reason

    out = {}
    for name, options in options_of(source.geometry, found.groups).items():
        kind = best.types[name]
        size = next((o.bytes for o in options if o.kind == kind), 0)
        near = [{"type": o.kind, "bytes": o.bytes, "kld": found.groups[name].cost(o.kind)} for o in options]
        kinds = [o.kind for o in options]
        at = kinds.index(kind) if kind in kinds else -1
        smaller = near[at - 1] if at > 0 else None
        larger = near[at + 1] if 0 <= at < len(near) - 1 else None
        out[name] = Reason(size, found.groups[name].cost(kind), smaller, larger)
    return out


def _by_role(tensors: dict[str, str]) -> list[tuple[str, str]]:
    """Each kind of matrix with its types by layer, equal neighbours together: 0-6 Q4_K, 7 Q5_K."""
    from itertools import groupby

    from ..convert.gguf.names import split_block

    roles: dict[str, list[tuple[int | None, str]]] = {}
    for name, kind in tensors.items():
        layer, stem = split_block(name)
        roles.setdefault(stem.removesuffix(".weight"), []).append((layer, kind))
    rows = []
    for role, found in roles.items():
        runs = [list(run) for _, run in groupby(found, key=lambda item: item[1])]
        spans = [
            run[0][1] if run[0][0] is None else f"{run[0][0]}{f'-{run[-1][0]}' if len(run) > 1 else ''} {run[0][1]}"
            for run in runs
        ]
        rows.append((role, ", ".join(spans)))
    return rows


def _change(why: Any, other: dict[str, Any] | None) -> str:  # noqa: ANN401
    if other is None:
        return ""
    return f"{other['type']} {other['bytes'] - why.bytes:+,} B {1e3 * (other['kld'] - why.kld):+.3f}"
