"""Held-out rows: a few of each matrix that its moments never saw, and what they say of what was fitted to the others.

The correction goes as far as they confirm, and a matrix that error feedback made worse than a plain search weighted by
importance is rounded plainly. Rows are those of other tokens, of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...quantize.ggml.codec import decode, encode
from ...quantize.ggml.types import GGMLType
from ..model.distributed import rank_share, world
from ..statistics.held import FEWEST, HELD, choose

SAMPLE = 64  # outputs of a matrix by which the two ways of rounding are compared


@dataclass(frozen=True)
class Held:
    """Rows of E matrices of n inputs: x of the reference, z of the written model [E, HELD, n].

    Each is multiplied by its router weight, zero where there is none. d [E, HELD, O]: what the residual stream lacks
    (O = 0: of matrices that do not add to it). By matrix: rows met and rows held. places: of the HELD that this rank
    may fill; the other ranks fill the others.
    """

    x: Tensor
    z: Tensor
    d: Tensor
    met: list[int]
    count: list[int] = field(default_factory=list)
    places: range = range(HELD)

    @classmethod
    def empty(cls, matrices: int, inputs: int, device: torch.device | str, outputs: int = 0) -> Held:
        """No rows yet, of `matrices` matrices of `inputs` inputs."""
        x, z, d = (torch.zeros(matrices, HELD, n, device=device) for n in (inputs, inputs, outputs))
        return cls(x, z, d, [0] * matrices, [0] * matrices, rank_share(HELD, *world()))

    def choose(self, offsets: list[int], first: int = 0) -> tuple[Tensor, Tensor]:
        """Which of the next rows to hold, and where (`fill`): [C] int64 each, as `statistics.held.choose`."""
        rows, places = choose(offsets, self.met, self.count, self.places, first)
        return rows.to(self.x.device), places.to(self.x.device)

    def fill(self, places: Tensor, x: Tensor, z: Tensor, d: Tensor | None = None) -> None:
        """Hold rows [C, n] (d [C, O]) at `places`."""
        for held, rows in ((self.x, x), (self.z, z), (self.d, d)):
            if rows is not None:
                held.flatten(0, 1)[places] = rows

    def enough(self, part: slice) -> Tensor:
        """[E] which matrices of `part` have rows to decide by."""
        return torch.tensor(self.count[part], device=self.x.device) >= FEWEST

    def agreement(self, part: slice, weight: Tensor, target: Tensor, matrices: int = 1) -> Tensor:
        """[2, E, matrices]: the product of what outputs lack and what target - weight [E, O, n] gives, and its square.

        The square is of the latter. Both add over blocks of rows. matrices: how many are stacked by rows.
        """
        x, z = self.x[part], self.z[part]
        missing, given = (x - z) @ weight.mT, z @ (target - weight).mT
        if self.d.shape[2]:
            missing += self.d[part]
        sums = torch.stack(((missing * given).sum(1), given.square().sum(1)))
        return sums.unflatten(-1, (matrices, -1)).sum(-1)

    def share(self, part: slice, agreement: Tensor) -> Tensor:
        """[E, matrices] in 0..1: how much of the difference brings outputs nearest to the reference's."""
        best = agreement[0] / agreement[1].clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(self.enough(part).unsqueeze(1), best.clamp(0, 1), torch.ones_like(best))

    def errors(self, part: slice, weight: Tensor, values: Tensor) -> Tensor:
        """[E, O] squared error of the outputs of `values` on z against those of `weight` on x, and what d adds."""
        error = self.x[part] @ weight.mT - self.z[part] @ values.mT
        if self.d.shape[2]:
            error += self.d[part]
        return error.square().sum(1)

    def outputs(self, rows: slice | Tensor) -> Held:
        """The same for some outputs alone."""
        return replace(self, d=self.d[:, :, rows]) if self.d.shape[2] else self

    def worse(
        self, part: slice, weight: Tensor, values: Tensor, kind: GGMLType, importance: Tensor, matrices: int
    ) -> Tensor:
        """[E, matrices] where `values` [E, O, n] err more than a plain search under importance [E, n] would.

        matrices: how many are stacked by rows. SAMPLE outputs of each decide.
        """
        experts, outputs, n = weight.shape
        each = outputs // matrices
        inside = torch.linspace(0, each - 1, min(SAMPLE, each), device=weight.device).round().long()
        rows = (torch.arange(matrices, device=weight.device).unsqueeze(1) * each + inside).flatten()
        some = weight[:, rows].float()
        plain = decode(encode(some.flatten(0, 1), kind, importance.contiguous()), kind, n).view_as(some)
        found, simple = (
            self.outputs(rows).errors(part, some, v).view(experts, matrices, -1).sum(-1)
            for v in (values[:, rows], plain)
        )
        return (found > simple) & self.enough(part).unsqueeze(1)
