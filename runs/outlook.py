"""What a run will need, from headers alone: its dry run, and what it refuses before it begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmquant.errors import FitError, MmquantError
from mmquant.tables import Size, table

from ..calibration.text.sample import text_files
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.fitting.verdict import Fit
from .artifacts import Plans, shape_of, streams_of
from .corpus import check_texts, context_of
from .gguf import is_calibrated
from .needs import Needs
from .options import GgufOptions, PlannedOptions, TextOptions, WeightsOptions
from .place import free_bytes
from .recipe.read import Recipe, Variant
from .run_fit import Shape, fits_of, lines_of, refusal
from .run_needs import run_needs
from .summary import WEIGHTS
from .uploads import FILES, deletes_early

MOST_WINDOWS = 128  # of a check that names no number
UNPLANNED = "planned"  # a variant whose plan has not been made yet


@dataclass
class Outlook:
    """Variants with plans, what they will be, what does not work. sizes: bytes on disk at once; done: names."""

    variants: list[Variant] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    fits: dict[str, dict[str, Fit]] = field(default_factory=dict)
    done: Collection[str] = ()
    refusal: MmquantError | None = None

    @property
    def disk(self) -> int:
        """Bytes of artifacts on disk at once."""
        return sum(self.sizes.values())


def outlook(
    recipe: Recipe, source: Checkpoint, out: Path, plans: Plans, dry_run: bool = False, done: Collection[str] = ()
) -> Outlook:
    """Every variant as it will be; plans are made now, but for those of artifacts that are done.

    InputError, with its line, for a variant that does not suit the model.
    """
    found = Outlook(done=done)
    for given in recipe.variants:
        with recipe.at("variants", given.name):
            variant = given
            if dry_run and not (out / given.name).exists() and _calibrated(given):
                check_texts(cast("TextOptions", given.options))
            if not ((dry_run or given.name in done) and _unknown(given, out / given.name, plans)):
                variant = plans.planned(given, dry_run)
                shape = shape_of(source, variant, recipe.model, out / given.name)
                if shape is not None:
                    found.shapes[given.name] = shape
        found.variants.append(variant)
        found.sizes[given.name] = _on_disk(recipe, variant, found.shapes.get(given.name))
    if dry_run and not out.exists() and recipe.check is not None:
        with recipe.at("check", "text"):
            text_files(recipe.check.text)
    if recipe.fit is not None:
        found.fits = fits_of(recipe.fit, found.shapes, source.geometry)
    found.refusal = refusal(found.fits) or _too_small(recipe, source, out, found, plans.device)
    return found


def _unknown(variant: Variant, out: Path, plans: Plans) -> bool:
    """Whether the plan of a variant needs a measurement that has not been made."""
    options = variant.options
    asks = isinstance(options, PlannedOptions) and (options.size is not None or options.target is not None)
    return asks and options.sensitivity is None and not plans.is_measured(out)


def _on_disk(recipe: Recipe, variant: Variant, shape: Shape | None) -> int:
    """Bytes of an artifact that the disk holds at once."""
    if shape is None:
        return getattr(variant.options, "size", None) or 0
    if not deletes_early(recipe, variant.name):
        return shape.bytes
    largest = getattr(variant.options, "max_shard_size", None) or variant.options.max_part_size
    return min(shape.bytes, FILES * largest + -(-2 * shape.bytes // max(1, len(shape.weights.expert_layer))))


def streams(recipe: Recipe, source: Checkpoint) -> int:
    """Bytes of hidden states: those of calibrated variants, and of the check for the reference and each artifact."""
    own = sum(streams_of(source, variant) for variant in recipe.variants)
    return own + check_streams(recipe, source)


def check_streams(recipe: Recipe, source: Checkpoint) -> int:
    """Bytes of the check's hidden states."""
    if recipe.check is None:
        return 0
    models = 1 + sum(variant.command != "calibrate" for variant in recipe.variants)
    context = context_of(source, TextOptions(context=recipe.check.context))
    windows = recipe.check.windows or MOST_WINDOWS
    return 4 * windows * context * source.geometry.hidden * models


def _too_small(recipe: Recipe, source: Checkpoint, out: Path, found: Outlook, device: str) -> FitError | None:
    """FitError where disk or memory, or a limit of the recipe's, cannot do."""
    shards, states, limits = source.store.in_flight(), streams(recipe, source), recipe.limits
    whole = found.disk + shards + states
    have = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) if out.is_dir() else 0
    if limits.disk is not None and whole > limits.disk:
        return FitError(f"limits.disk {limits.disk:,}: artifacts, shards and hidden states take {whole:,} bytes")
    if whole - have > free_bytes(out):
        return FitError(f"{out}: {whole - have:,} bytes are needed, the disk has {free_bytes(out):,} free")
    on_gpu = device.startswith("cuda")
    limit, name = (limits.gpu, "gpu") if on_gpu else (limits.ram, "ram")
    least = least_memory(recipe, source, on_gpu)
    if limit is not None and least > limit:
        return FitError(f"limits.{name} {limit:,}: one dequantized layer and what it passes on take {least:,} bytes")
    return None


def least_memory(recipe: Recipe, source: Checkpoint, on_gpu: bool) -> int:
    """Bytes below which no forward pass works: a layer's weights, and on a CPU the hidden states."""
    forward = recipe.check is not None or any(_calibrated(variant) for variant in recipe.variants)
    if not forward:
        return 0
    g = source.geometry
    layer = (g.expert_weights + g.attention_weights) // g.layers
    return layer * 2 if on_gpu else layer * 4 + streams(recipe, source)


def _calibrated(variant: Variant) -> bool:
    options = variant.options
    if isinstance(options, GgufOptions):
        return is_calibrated(options) and options.statistics is None
    if isinstance(options, WeightsOptions):
        return options.method != "rtn" and options.statistics is None
    return isinstance(options, TextOptions)


def rows_of(found: Outlook) -> list[dict[str, Any]]:
    """One row for each variant of a dry run."""
    rows = []
    for variant in found.variants:
        shape = found.shapes.get(variant.name)
        label = shape.label if shape else "statistics" if variant.command == "calibrate" else UNPLANNED
        size = shape.weights.total if shape else getattr(variant.options, "size", None)
        rows.append({"name": variant.name, "command": variant.command, "label": label, "bytes": size})
    return rows


def needs(recipe: Recipe, source: Checkpoint, out: Path, device: str, found: Outlook) -> Needs:
    """Download, disk, memory, passes and time of the whole run; a measurement for plans is a pass of its own."""
    plans = Plans(source, out, device)
    measured = any(_unknown(variant, out / variant.name, plans) for variant in recipe.variants)
    sizes = [
        getattr(variant.options, "size", None) or 0 for variant in found.variants if variant.name not in found.shapes
    ]
    states, size = streams(recipe, source), sum(sizes) + sum(shape.bytes for shape in found.shapes.values())
    base = run_needs(recipe, out, source, size, states, device)
    disk, passes = found.disk + source.store.in_flight() + states, 1 + measured
    return dataclasses.replace(base, disk=disk, passes=passes, download=base.download * passes)


def lines(recipe: Recipe, source: Checkpoint, found: Outlook, takes: Needs, stopped: MmquantError | None) -> list[str]:
    """What a dry run prints."""
    head = ("variant", "command", "artifact", WEIGHTS)
    sizes = [None if row["bytes"] is None else Size(row["bytes"]) for row in rows_of(found)]
    cells = [(r["name"], r["command"], r["label"], size) for r, size in zip(rows_of(found), sizes, strict=True)]
    text = table(head, cells, text=head[:3])
    text += ["", *takes.lines("no" if stopped else "yes")]
    text.append(f"hidden states: {streams(recipe, source):,} bytes, counted in disk and RAM")
    return text + lines_of(found.fits)
