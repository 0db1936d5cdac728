"""Plans of folders (INT4, NVFP4, MXFP4, MLX): which layers' experts and attention stay wider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import FitError
from mmquant.tables import gib

from ..calibration.plan.allocate import Allocation, cheapest
from ..calibration.plan.knapsack import Option, smallest, undominated
from ..calibration.plan.measure_folder import FolderMeasurement
from ..calibration.plan.sensitivity import Measured
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.fitting.budgets import folder_budget, unified_budget
from ..convert.folder.kinds import ATTENTION, EMBEDDINGS, EXPERTS, Kind, group_name, plan_row
from ..convert.folder.mlx import MlxVariant
from ..convert.folder.unit_bytes import fixed_bytes, header_bytes, unit_specs
from ..convert.folder.variant import FolderVariant
from ..convert.folder.weights import WeightsVariant
from ..convert.folder.writer import plan_shards
from .folder_steps import prepare
from .options import PlanOptions
from .plan_target import check_context, target_of
from .planner import size_of, too_small

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.text.corpus import Corpus


SEARCHES = 7  # of the bytes by which headers were counted too high


class FolderPlanner:
    """See `planner.Planner`. devices: over which tensor parallelism must split what is chosen."""

    def __init__(self, source: Checkpoint, options: PlanOptions) -> None:
        """InputError for a target that its engine does not know, and where no group divides the model."""
        self.format, self.source, self.g = options.format, source, source.geometry
        self.row, self.devices = plan_row(options.format), options.tp
        self.target = None if options.target is None else target_of(options.target)
        if self.format == "mlx":
            self.devices = 1
        elif self.target is not None and self.target.cards is not None:
            self.devices = self.target.cards.count
        self.allowed = self.row.groups(self.g, self.devices)

    @property
    def measured(self) -> Mapping[str, Sequence[str]]:
        """By unit, the kinds that a measurement covers: whatever the parallelism."""
        return {name: [kind.word for kind in kinds] for name, kinds in self.row.groups(self.g).items()}

    @property
    def probes(self) -> Sequence[str]:
        """Kinds whose distance is measured to the end."""
        return self.row.probes

    def measurement(self, corpus: Corpus, judged: Tensor, device: str, out: Path) -> FolderMeasurement:
        """The pass that measures."""
        return FolderMeasurement(self.source, corpus, judged, self.row, device, out)

    @cached_property
    def sizes(self) -> dict[str, list[tuple[Kind, int, int]]]:
        """By unit: kind, bytes of its tensors, bytes with their part of the headers."""
        found: dict[str, list[tuple[Kind, int, int]]] = {}
        for name, kinds in self.allowed.items():
            found[name] = []
            for kind in kinds:
                data, headers = 0, 0
                for count, specs in unit_specs(self.source, self.row, name, kind):
                    data += count * sum(spec.bytes for spec in specs)
                    headers += count * header_bytes(self.source, specs)
                found[name].append((kind, data, data + headers))
        return found

    def options(self, groups: Mapping[str, Measured]) -> dict[str, list[Option]]:
        """Every unit's choices."""
        return {
            name: undominated([Option(kind.word, whole, groups[name].cost(kind.word)) for kind, _, whole in sizes])
            for name, sizes in self.sizes.items()
        }

    def solve(self, groups: Mapping[str, Measured], options: PlanOptions) -> Allocation:
        """The best choice. FitError that names the smallest that works.

        Options count headers by what they take at most, so how much more than the budget may be asked for is searched.
        """
        budget, word = self._budget(options)
        fixed, choices = fixed_bytes(self.source, self.row), self.options(groups)
        smallest_types = {name: min(some, key=lambda o: o.bytes).kind for name, some in choices.items()}
        least = self.exact(smallest_types)
        if least > budget:
            if self.target is None:
                raise too_small(options, budget, least)
            left = f"{gib(max(0, budget))} are left for weights of {options.target_context} tokens"
            raise FitError(f"{word}: {left}, the smallest {self.format} takes {gib(least)}")
        room = max(budget - fixed, smallest(choices))
        low, high, best = 0, max(0, smallest(choices) + fixed - least), self.within(groups, room)
        for _ in range(SEARCHES):
            middle = (low + high + 1) // 2
            found = self.within(groups, room + middle)
            if self.exact(found.types) <= budget:
                low, best = middle, found
            else:
                high = middle - 1
        return best

    def exact(self, types: Mapping[str, str]) -> int:
        """Bytes of all shards with their headers."""
        known = {kind.word: kind for unit in self.row.units.values() for kind in unit.kinds}
        units = {name: known[word] for name, word in types.items()}
        variant: FolderVariant
        if self.format == "mlx":
            outside = units[EMBEDDINGS]
            variant = MlxVariant(next(iter(units.values())), outside, outside, tuple(units.items()))
        else:
            layers = range(self.g.layers)
            kinds = tuple((units[group_name(n, EXPERTS)], units[group_name(n, ATTENTION)]) for n in layers)
            groups = [kind.group for kind in units.values() if kind.calibrated] or [self.narrowest.group]
            variant = WeightsVariant(max(groups), kinds=kinds, command=self.format)
        return sum(shard.bytes for shard in plan_shards(prepare(self.source, variant).steps))

    @cached_property
    def narrowest(self) -> Kind:
        """The smallest kind that there is for everything."""
        return next(iter(self.allowed.values()))[0]

    def _budget(self, options: PlanOptions) -> tuple[int, str]:
        if self.target is None:
            return size_of(options, self.weights), ""
        check_context(options.target_context, self.g)
        room = unified_budget if self.format == "mlx" else folder_budget
        return room(self.g, self.target, options.target_context), f"--target {options.target}"

    def within(self, groups: Mapping[str, Measured], budget: int) -> Allocation:
        """The best choice within bytes of units."""
        return cheapest(self.options(groups), groups, budget)

    def bytes_of(self, types: Mapping[str, str]) -> int:
        """Bytes of all tensors' data."""
        chosen = sum(data for name, sizes in self.sizes.items() for kind, data, _ in sizes if kind.word == types[name])
        return chosen + fixed_bytes(self.source, self.row, headers=False)

    @property
    def weights(self) -> int:
        """Weights of the whole model."""
        return self.g.parameters

    def placement(self, best: Allocation, options: PlanOptions) -> dict[str, int] | None:
        """Cards that share every matrix."""
        del best
        return None if options.target is None or self.format == "mlx" else {"tensor_parallel": self.devices}
