"""How one layer is quantized."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmquant.errors import InputError

from ...convert.models.names import EXPERT_STACKS
from ...quantize.integer.gptq import DAMPING
from ...quantize.integer.gptq_grid import GptqGrid
from ...quantize.integer.panel import Grid

PRIOR, FLOOR, SAMPLING = 16.0, 0.2, 4.0


@dataclass(frozen=True)
class LayerOptions:
    """How a layer is quantized.

    grids      of single projections of experts (gate, up, down) that have another one
    shrinkage  strength of the pool (quantize/moments.py) in diagonals and what AWQ scales by; prior: in what GPTQ feeds
               errors back under; floor, sampling: its ridge (`feedback_moments`)
    memory  working bytes beside the layer, its moments and its codes; None: by the device (`working_memory`)
    """

    method: str = "gptq"
    effort: str = "default"
    grid: Grid = field(default_factory=GptqGrid)
    attention: bool = False  # on the grid, too
    attention_grid: Grid | None = None  # where it is another one
    grids: tuple[tuple[str, Grid], ...] = ()
    damping: float = DAMPING
    shrinkage: float = 1.0
    prior: float = PRIOR
    floor: float = FLOOR
    sampling: float = SAMPLING
    memory: int | None = None
    seed: int = 0

    def grid_of(self, projection: str) -> Grid:
        """The grid of a projection of experts."""
        return dict(self.grids).get(projection, self.grid)

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """Projections that are solved as one matrix: they have one input, and one grid."""
        one = self.grid_of("gate") == self.grid_of("up")
        return EXPERT_STACKS if one else tuple((name,) for stack in EXPERT_STACKS for name in stack)

    @property
    def compensated(self) -> bool:
        """Whether rounding errors are fed back: GPTQ unless fast, and AWQ with high effort (then both)."""
        return (self.method, self.effort) in (("gptq", "default"), ("gptq", "high"), ("awq", "high"))

    @property
    def integers(self) -> GptqGrid:
        """The grid, where the method works on integers only (AWQ)."""
        if not isinstance(self.grid, GptqGrid):
            raise InputError(f"method {self.method}: expected an integer grid")
        return self.grid

    @property
    def full(self) -> bool:
        """Whether second moments are needed; fast GPTQ only rounds, under the diagonals."""
        return self.compensated or self.method == "awq"

    @property
    def sign_rounded(self) -> bool:
        """Whether rounding is learned on the layer's output after GPTQ."""
        return self.method == "gptq" and self.effort == "high"
