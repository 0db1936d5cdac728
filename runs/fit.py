"""What fits where: what `mmquant fit` prints, from config.json alone or from an artifact's headers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError, InputError
from mmquant.tables import gib

from ..convert.fitting.artifact import Artifact, geometry_of, read_artifact
from ..convert.fitting.catalog import Row, find_rows, rows
from ..convert.fitting.commands import Command, commands, override_tensor
from ..convert.fitting.entry import entry_of, folder_of
from ..convert.fitting.targets import Target, find_target, machine, read_targets
from ..convert.fitting.verdict import NO, YES, Fit, cache_of, check_context
from ..convert.fitting.verdict import fit as fit_row
from ..convert.hub.address import parse_address
from ..convert.naming import short_name
from ..convert.open import DEMO
from .fit_text import detail, table
from .options_use import FitOptions
from .results import Result

if TYPE_CHECKING:
    from ..convert.models.geometry import Geometry

DEFAULT_MODEL = "hf:MiniMaxAI/MiniMax-M2.7"


@dataclass(frozen=True)
class Fits(Result):
    """Verdicts of types (or of one artifact) on machines: budgets, contexts, placements, speed bounds, commands.

    model: what was asked; fits: one for each type and machine; artifact: None when a model was fitted.
    """

    model: str
    geometry: Geometry
    fits: tuple[Fit, ...]
    artifact: Artifact | None = None
    asked_cache: bool = False

    @property
    def stem(self) -> str:
        """The model's own name, which its artifacts carry."""
        return short_name(parse_address(self.model).spec or self.model) if self.model != DEMO else DEMO

    def made_by(self, found: Fit) -> list[str]:
        """The command that writes it; none for an artifact that is there."""
        if not found.row.command:
            return []
        model = [] if self.model == DEFAULT_MODEL else ["--model", self.model]
        return ["mmquant", *found.row.command, *model, "--out", folder_of(found.row, self.stem)]

    def commands(self, found: Fit) -> list[Command]:
        """Commands that start it; none for no."""
        architecture = self.geometry.architecture
        if self.artifact is None:
            entry, parts = entry_of(found.row, self.geometry, self.stem)
            return commands(found, architecture, entry, parts, asked=self.asked_cache)
        own = found.placement.cache == self.artifact.cache
        entry, parts = self.artifact.entry, self.artifact.parts
        return commands(found, architecture, entry, parts, asked=self.asked_cache and not own)

    @cached_property
    def refusal(self) -> FitError | None:
        """Nothing fits: what is missing, and the smallest that would do."""
        if any(found.verdict != NO for found in self.fits):
            return None
        return FitError(_smallest(self.geometry, self.fits))

    def rows(self) -> list[dict[str, Any]]:
        """One for each type and machine."""
        return [
            {
                "type": found.row.id,
                "target": found.target.id,
                "bytes": found.weights.total,
                "bits": round(8 * found.weights.total / self.geometry.parameters, 3),
                "verdict": found.verdict,
                "context": found.context,
                "missing": found.missing,
                "tokens_per_second_bound": round(found.tokens_per_second, 1),
            }
            for found in self.fits
        ]

    def to_dict(self) -> dict[str, Any]:
        """What --json prints: every device, placement and command besides."""
        found = [row | self._more(fit) for row, fit in zip(self.rows(), self.fits, strict=True)]
        sizes = {"parameters": self.geometry.parameters, "active_parameters": self.geometry.active_parameters}
        return {"model": self.model, **sizes, "geometry": asdict(self.geometry), "fits": found}

    def _more(self, found: Fit) -> dict[str, Any]:
        place = found.placement
        placement: dict[str, Any] = {"engine": place.engine, "tensor_parallel": place.tensor_parallel}
        placement |= {"expert_parallel": place.expert_parallel, "n_cpu_moe": place.cpu_layers}
        placement |= {"tensor_split": list(place.split), "override_tensor": override_tensor(found)}
        lines = [{"engine": c.engine, "argv": list(c.argv), "env": c.env, "note": c.note} for c in self.commands(found)]
        return {
            "basis": "estimated",
            "kv_cache": place.cache,
            "placement": placement,
            "budget": [device.row() for device in place.devices],
            "reason": found.reason,
            "made_by": self.made_by(found),
            "commands": lines,
        }

    def lines(self) -> list[str]:
        """The same for people: one machine and type in full, else a table."""
        if len(self.fits) == 1:
            return detail(self.fits[0], self.geometry, self.commands(self.fits[0]), self.made_by(self.fits[0]))
        return table(self.model, self.geometry, self.fits)


def fit(artifact: str | Path | None = None, options: FitOptions | None = None, *, model: str = DEFAULT_MODEL) -> Fits:
    """Which types of a model (or whether an artifact) fit which machines, with context, placement and commands.

    artifact: a finished folder or GGUF file, or a repository of one (hf:ORG/NAME[:TYPE]); None: every type of `model`
    that can be written, by its config.json.
    Without a machine in the options all machines of the table. Reads headers only; M2.7 is known offline.

    Raises InputError for a type, a machine, a size or a context that is none.
    """
    chosen = options or FitOptions()
    machines = targets_of(chosen)
    if artifact is not None:
        if chosen.type is not None:
            raise InputError(f"--type {chosen.type}: the artifact has its own; leave it out")
        found = read_artifact(artifact)
        check_context(chosen.context, found.geometry)
        cache = cache_of(found.row, chosen.kv_cache, found.cache)
        fits = [_fit(found.row, found.geometry, t, chosen.context, cache) for t in machines]
        return Fits(str(artifact), found.geometry, tuple(fits), found, chosen.kv_cache is not None)
    geometry, types = geometry_of(model), find_rows(chosen.type)
    check_context(chosen.context, geometry)
    fits = [
        _fit(row, geometry, target, chosen.context, cache_of(row, chosen.kv_cache))
        for row in map(lambda row: _weighed(row, geometry), types)
        for target in machines
    ]
    return Fits(model, geometry, tuple(fits), None, chosen.kv_cache is not None)


def _weighed(row: Row, g: Geometry) -> Row:
    """The row with its bytes computed once for all machines."""
    weights = row.weigh(g)
    return Row(row.id, row.family, row.format, row.command, lambda _: weights, row.group, row.cuda)


def _fit(row: Row, g: Geometry, target: Target, context: int | None, cache: str) -> Fit:
    return fit_row(row, g, target, context=context, cache=cache)


def targets_of(options: FitOptions) -> list[Target]:
    """The machines that were asked for: one of the table, the user's own, or all."""
    known = read_targets(options.targets)
    if options.target is not None:
        return [find_target(options.target, known)]
    if options.gpu is not None or options.ram is not None:
        return [machine(options.gpu, options.ram)]
    return list(known.values())


def _smallest(g: Geometry, fits: tuple[Fit, ...]) -> str:
    """One line for what fits nowhere: the nearest miss, and the smallest type or machine that works."""
    near = min(fits, key=lambda f: (bool(f.reason), f.missing))
    why = near.reason or f"{gib(near.missing)} are missing"
    said = f"{near.row.id} on {near.target.id}: does not fit, {why}"
    context = near.placement.context
    others = sorted((_weighed(row, g) for row in rows()), key=lambda row: -row.weigh(g).total)
    here = next((r.id for r in others if _fit(r, g, near.target, None, "f16").verdict == YES), None)
    if here is not None:
        return f"{said}; the largest type that fits there is {here}"
    smallest = others[-1]
    known = list(read_targets().values())
    there = next((t.id for t in known if _fit(smallest, g, t, context, "f16").verdict == YES), None)
    return f"{said}; nothing fits there: the smallest, {smallest.id}, needs {there or 'a larger machine'}"
