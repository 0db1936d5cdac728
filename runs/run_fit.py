"""Which artifacts of a run fit the machines that its recipe names: beforehand, at the end, and in their manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmquant.errors import FitError
from mmquant.tables import gib, table

from ..convert import manifest
from ..convert.fitting.manifest import fit_of, target_blocks
from ..convert.fitting.verdict import NO, Fit
from ..convert.fitting.weights import Weights
from ..convert.models.geometry import Geometry
from .fit_text import context_words

if TYPE_CHECKING:
    from .recipe.read import FitTargets


@dataclass(frozen=True)
class Shape:
    """An artifact by its headers. storage: the manifest's format; run: what made it; bytes: of its files."""

    label: str
    bytes: int
    weights: Weights
    storage: str
    run: Mapping[str, Any]


def fits_of(wanted: FitTargets, shapes: Mapping[str, Shape], g: Geometry) -> dict[str, dict[str, Fit]]:
    """By machine, by artifact."""
    return {
        target.id: {
            name: fit_of(name, shape.storage, shape.weights, g, shape.run, target, wanted.context)
            for name, shape in shapes.items()
        }
        for target in wanted.targets
    }


def refusal(found: Mapping[str, Mapping[str, Fit]]) -> FitError | None:
    """A machine of the recipe that none of its variants fits."""
    for target, fits in found.items():
        if fits and all(fit.verdict == NO for fit in fits.values()):
            near = min(fits, key=lambda name: (bool(fits[name].reason), fits[name].missing))
            return FitError(f"fit.targets {target}: no variant fits; nearest {near}, {_words(fits[near])}")
    return None


def lines_of(found: Mapping[str, Mapping[str, Fit]]) -> list[str]:
    """A table: artifacts by machines, each with the context that fits."""
    if not found:
        return []
    names = list(next(iter(found.values())))
    head = ("fits", *found)
    return table(head, [(name, *(_cell(fits[name]) for fits in found.values())) for name in names], text=head)


def _cell(fit: Fit) -> str:
    if fit.verdict == NO:
        return "no" if fit.reason else f"no, {gib(fit.missing)} short"
    return f"{fit.verdict}, {context_words(fit.context)}"


def _words(fit: Fit) -> str:
    return fit.reason or f"{gib(fit.missing)} missing"


def note_fits(wanted: FitTargets, folder: Path, shape: Shape, g: Geometry) -> None:
    """Put the recipe's machines into an artifact's manifest and FIT.md, where it is finished."""
    made = manifest.read(folder)
    if made is None:
        return
    artifact = made["artifacts"][0]
    facts = (artifact["id"], shape.storage, artifact["entry"], shape.weights, g, shape.run)
    manifest.set_targets(folder, target_blocks(*facts, targets=wanted.targets, context=wanted.context))
