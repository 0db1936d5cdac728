"""What a plan must know of its format: what there is to choose, how it is measured, what fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mmquant.errors import FitError

from .options import PlanOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.plan.allocate import Allocation
    from ..calibration.plan.knapsack import Option
    from ..calibration.plan.resume import Measurement
    from ..calibration.plan.sensitivity import Measured
    from ..calibration.text.corpus import Corpus
    from ..convert.checkpoints.checkpoint import Checkpoint

UNIT = re.compile(r"layers\.([0-9]+)\.(\w+)")


class Planner(Protocol):
    """One format of a plan, for one model. Groups are what takes one type: a matrix of a GGUF file, a folder's unit."""

    format: str

    @property
    def measured(self) -> Mapping[str, Sequence[str]]:
        """By group, the types that a measurement covers."""
        ...

    @property
    def probes(self) -> Sequence[str]:
        """Types whose distance is measured to the end."""
        ...

    def measurement(self, corpus: Corpus, judged: Tensor, device: str, out: Path) -> Measurement:
        """The pass that measures."""
        ...

    def options(self, groups: Mapping[str, Measured]) -> dict[str, list[Option]]:
        """Every group's choices, from small to large."""
        ...

    def solve(self, groups: Mapping[str, Measured], options: PlanOptions) -> Allocation:
        """The best choice. FitError that names the smallest that works."""
        ...

    def within(self, groups: Mapping[str, Measured], budget: int) -> Allocation:
        """The best choice within bytes of what has a choice."""
        ...

    def bytes_of(self, types: Mapping[str, str]) -> int:
        """Bytes of all tensors' data."""
        ...

    @property
    def weights(self) -> int:
        """Weights of the whole model."""
        ...

    def placement(self, best: Allocation, options: PlanOptions) -> dict[str, int] | None:
        """What the engine is told of a target's devices."""
        ...


def planner_of(source: Checkpoint, options: PlanOptions) -> Planner:
    """The planner of --format. InputError for one that has none."""
    if options.format == "gguf":
        from .planner_gguf import GgufPlanner

        return GgufPlanner(source)
    from .planner_folder import FolderPlanner

    return FolderPlanner(source, options)


def size_of(options: PlanOptions, weights: int) -> int:
    """Bytes of the artifact that --size or --bits allow."""
    if options.size is not None:
        return options.size
    assert options.bits is not None
    return int(options.bits * weights / 8)


def too_small(options: PlanOptions, budget: int, least: int) -> FitError:
    """What to say of a size or bits that nothing reaches."""
    word = "--bits" if options.bits is not None else "--size"
    return FitError(f"{word}: {budget:,} bytes, the smallest takes {least:,} ({least / 1e9:.3f} GB)")


def split_name(name: str) -> tuple[int | None, str]:
    """(layer, role) of a group: blk.3.attn_q.weight -> (3, attn_q), layers.3.experts -> (3, experts)."""
    from ..convert.gguf.names import split_block

    if (unit := UNIT.fullmatch(name)) is not None:
        return int(unit[1]), unit[2]
    layer, stem = split_block(name)
    return layer, stem.removesuffix(".weight")
