"""Plans of GGUF files: a type for every matrix, card and RAM as budgets of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mmquant.errors import FitError

from ..calibration.plan.allocate import Allocation, allocate, allocate_placed, options_of
from ..calibration.plan.groups import group_shapes, kinds_of
from ..calibration.plan.knapsack import Option, smallest
from ..calibration.plan.measure import PROBES, Measurement
from ..calibration.plan.sensitivity import Measured
from ..convert.checkpoints.checkpoint import Checkpoint
from ..convert.gguf.mixes import data_bytes, find_mix
from ..convert.gguf.names import all_shapes
from ..convert.gguf.plan import make_plan
from ..convert.gguf.variant import GgufVariant
from ..convert.gguf.writer import padded
from .options import PlanOptions
from .plan_target import budgets_of
from .planner import size_of, too_small

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.text.corpus import Corpus

KEYS = 1024  # bytes of a header that say which text a file was calibrated on, at most


class GgufPlanner:
    """See `planner.Planner`."""

    format = "gguf"

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.g = source, source.geometry

    @property
    def measured(self) -> Mapping[str, Sequence[str]]:
        """By matrix, the types that a measurement covers."""
        return {name: kinds_of(name, shape[-1]) for name, shape in group_shapes(self.g).items()}

    @property
    def probes(self) -> Sequence[str]:
        """Types whose distance is measured to the end."""
        return PROBES

    def measurement(self, corpus: Corpus, judged: Tensor, device: str, out: Path) -> Measurement:
        """The pass that measures."""
        return Measurement(self.source, corpus.tokens, judged, device, out)

    def options(self, groups: Mapping[str, Measured]) -> dict[str, list[Option]]:
        """Every matrix's choices."""
        return options_of(self.g, groups)

    def solve(self, groups: Mapping[str, Measured], options: PlanOptions) -> Allocation:
        """The best choice. FitError that names the smallest that works."""
        fixed, headers = self.fixed
        if options.target is not None:
            card, host = budgets_of(options.target, self.g, options.target_context)
            if card is None:
                return allocate(self.g, groups, host - fixed)
            return allocate_placed(self.g, groups, card - fixed, host)
        budget = size_of(options, self.weights)
        try:
            return allocate(self.g, groups, budget - fixed - headers)
        except FitError:
            least = smallest(options_of(self.g, groups)) + fixed + headers
            raise too_small(options, budget, least) from None

    def within(self, groups: Mapping[str, Measured], budget: int) -> Allocation:
        """The best choice within bytes of matrices."""
        return allocate(self.g, groups, budget)

    def bytes_of(self, types: Mapping[str, str]) -> int:
        """Bytes of all tensors' data."""
        return data_bytes(self.g, dict(types))

    @property
    def weights(self) -> int:
        """Weights of the model, all tensors of a GGUF file."""
        return sum(math.prod(shape) for shape in all_shapes(self.g).values())

    @cached_property
    def fixed(self) -> tuple[int, int]:
        """(bytes of tensors that have no choice: norms, routers; bytes of headers, with room for more keys)."""
        whole = make_plan(self.source, GgufVariant(find_mix("Q4_K_M"), "planned", True), None)
        tensors = [tensor for step in whole.steps for tensor in step]
        data, chosen = sum(padded(tensor.bytes) for tensor in tensors), group_shapes(self.g)
        fixed = sum(padded(tensor.bytes) for tensor in tensors if tensor.name not in chosen)
        return fixed, whole.bytes - data + KEYS

    def placement(self, best: Allocation, options: PlanOptions) -> dict[str, int] | None:
        """Layers whose experts lie in RAM."""
        del options
        return None if best.host_layers is None else {"n_cpu_moe": best.host_layers}
