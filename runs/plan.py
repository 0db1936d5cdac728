"""Plan an artifact for a size or a machine: measure once, choose exactly, write plan.json."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, InputError
from mmquant.monitor import Monitor, phase, watching
from mmquant.tables import table

from .corpus import context_of, make_corpus
from .models import Model, choose_device, opened
from .options import PlanOptions
from .planner import Planner, planner_of, split_name
from .results import Result

if TYPE_CHECKING:
    from ..calibration.plan.allocate import Allocation
    from ..calibration.plan.knapsack import Option
    from ..calibration.plan.sensitivity import Sensitivity
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint
    from ..convert.hub.store import FetchOptions
    from ..convert.plan_file import PlanFile

PLAN, SENSITIVITY = "plan.json", "sensitivity.json"
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
        size = f"{plan.bytes:,} bytes, {plan.bits_per_weight:.3f} bits per weight"
        head = f"{self.path}: {size}, predicted KLD {plan.kld:.4f}"
        found = [head, "", *table(("matrix", "types"), _by_role(plan.tensors), text=("matrix", "types"))]
        curve = sorted({*((p.bytes, p.kld) for p in plan.curve), (plan.bytes, plan.kld)})
        found += ["", *table(("bytes", "predicted KLD"), [(f"{size:,}", f"{kld:.4f}") for size, kld in curve])]
        if plan.placement is not None:
            found += ["", *(f"{name}: {value:,}" for name, value in plan.placement.items())]
        return [*found, "", *self._explained()] if explain else found

    def plot(self, path: str | Path) -> None:
        """Draw the plan to a .png, .svg or .pdf file. InputError where matplotlib is not installed."""
        from .plan_plot import draw

        draw(self.plan, Path(path))

    def _explained(self) -> list[str]:
        rows = []
        for name, kind in self.plan.tensors.items():
            why = self.plan.reasons[name]
            rows.append((name, kind, f"{1e3 * why.kld:.3f}", _change(why, why.smaller), _change(why, why.larger)))
        head = ("tensor", "type", "KLD x 1000", "smaller", "larger")
        return table(head, rows, text=("tensor", "type", "smaller", "larger"))


def plan(
    model: Model,
    out: str | Path,
    options: PlanOptions | None = None,
    *,
    device: str | None = None,
    fetch: FetchOptions | None = None,
    monitor: Monitor | None = None,
) -> Planned:
    """Choose the type of every matrix for a size, bits per weight or a machine; plan.json goes into the folder `out`.

    With another format than gguf: which layers' experts and attention stay wider.

    What was measured is kept beside it (sensitivity.json) and used again; an interrupted measurement is continued.

    Raises InputError for options or files that will not do, FitError for a budget that nothing fits (it names the
    smallest that works).
    """
    from ..calibration.plan.sensitivity import read_sensitivity

    chosen, out = options or PlanOptions(), Path(out)
    asked(chosen)
    with watching(monitor), opened(model, fetch, out) as source:
        planner = planner_of(source, chosen)
        check_size(planner, chosen)
        path = chosen.sensitivity or out / SENSITIVITY
        if chosen.sensitivity is None:
            measure_into(source, planner, out, chosen, choose_device(device))
        found = read_sensitivity(path)
        found.check(path, source.fingerprint, planner.format, planner.measured)
        made = make(source, planner, found, chosen)
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


def check_size(planner: Planner, options: PlanOptions) -> None:
    """FitError before anything is measured, where not even the smallest types fit."""
    from ..calibration.plan.sensitivity import Measured

    nothing = {name: Measured(dict.fromkeys(kinds, 1.0), {}) for name, kinds in planner.measured.items()}
    planner.solve(nothing, options)


def measure_into(source: Checkpoint, planner: Planner, out: Path, options: PlanOptions, device: str) -> None:
    """Measure the model's sensitivity into sensitivity.json of `out`, unless that is there for this model and text."""
    from ..calibration.plan.resume import forget, keep, take_up
    from ..calibration.plan.sensitivity import Sensitivity, read_sensitivity
    from ..convert.files.atomic import making
    from ..convert.files.lock import hold

    path, corpus = out / SENSITIVITY, make_corpus(source, options)
    chosen, form = judged_windows(corpus, source, options), planner.format
    text = {"fingerprint": corpus.fingerprint, "judged": chosen, "corpus": corpus.describe()}
    text |= {"probes": list(planner.probes)}
    if path.exists():
        known = read_sensitivity(path)
        if (known.model, known.format, known.text) == (source.fingerprint, form, text):
            return
        raise InputError(
            f"{path}: measured on another model, text or format; name it by --sensitivity, or take another --out"
        )
    with making(out), hold(out):
        rest = [i for i in range(len(corpus.tokens)) if i not in set(chosen)]
        calibration = replace(corpus, tokens=corpus.tokens[rest], domain=corpus.domain[rest])
        pass_ = planner.measurement(calibration, corpus.tokens[chosen], device, out)
        identity = hashlib.sha256(json.dumps([source.fingerprint, form, text, device]).encode()).hexdigest()
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
        Sensitivity(source.fingerprint, text, domains, groups, form).write(path)
        forget(out)


def judged_windows(corpus: Corpus, source: Checkpoint, options: PlanOptions) -> list[int]:
    """Windows that are left out of the calibration to judge by: evenly spaced, so of every domain. InputError."""
    count = options.judged_windows or (24 if context_of(source, options) <= 512 else 4)
    windows = len(corpus.tokens)
    if 2 * count > windows:
        raise InputError(f"--judged-windows {count}: the text has {windows} windows, expected twice as many")
    return [int((i + 0.5) * windows / count) for i in range(count)]


def make(source: Checkpoint, planner: Planner, found: Sensitivity, options: PlanOptions) -> PlanFile:
    """The plan, with its reasons and the curve of alternatives."""
    from ..convert.plan_file import PlanFile, Point

    best = planner.solve(found.groups, options)
    curve: list[Point] = []
    for share in CURVE:
        try:
            other = planner.within(found.groups, int(share * best.bytes))
        except FitError:
            continue
        if (point := Point(planner.bytes_of(other.types), other.kld)) not in curve and other.types != best.types:
            curve.append(point)
    size = planner.bytes_of(best.types)
    return PlanFile(
        planner.format,
        source.fingerprint,
        source.label,
        asked(options),
        size,
        8 * size / planner.weights,
        best.kld,
        best.types,
        reasons_of(planner.options(found.groups), found, best),
        tuple(curve),
        planner.placement(best, options),
        str(found.text.get("fingerprint", "")),
    )


def reasons_of(choices: dict[str, list[Option]], found: Sensitivity, best: Allocation) -> dict[str, Any]:
    """By group, what its type costs and what its neighbours would."""
    from ..convert.plan_file import Reason

    out = {}
    for name, options in choices.items():
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

    roles: dict[str, list[tuple[int | None, str]]] = {}
    for name, kind in tensors.items():
        layer, role = split_name(name)
        roles.setdefault(role, []).append((layer, kind))
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
