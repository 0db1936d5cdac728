"""Report of one quantized layer, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmquant.monitor import PLAIN, RESCUED, UNSEEN

from ...convert.models.names import EXPERT_STACKS
from ...quantize.integer.panel import Solved
from ..statistics.layer import LayerStatistics

Stacks = tuple[tuple[str, ...], ...]
LEAST_ROWS = 32  # an expert that saw fewer is reported


@dataclass(frozen=True)
class LayerReport:
    """What the user should know of a layer.

    Experts without calibration, hard factorizations, matrices that feedback made worse, rescaled experts.
    """

    layer: int
    unseen: tuple[int, ...] = ()
    starved: tuple[int, ...] = ()
    damped: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    rescaled: dict[int, int] = field(default_factory=dict)
    plain: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many of each kind of finding that a run adds up."""
        return {RESCUED: len(self.rescaled), UNSEEN: len(self.unseen), PLAIN: len(self.plain)}

    def lines(self) -> Iterator[str]:
        """One line per finding."""
        if self.unseen:
            yield f"layer {self.layer}: experts {_some(self.unseen)} saw no token; the layer's pooled moments were used"
        if self.starved:
            yield f"layer {self.layer}: experts {_some(self.starved)} saw fewer than {LEAST_ROWS} calibration tokens"
        if self.damped:
            yield f"layer {self.layer}: {_some(self.damped)} needed more damping"
        if self.rounded:
            yield f"layer {self.layer}: {_some(self.rounded)} could not be factored and were rounded to nearest"
        if self.plain:
            said = "rounded without error feedback, which held-out rows say is worse"
            yield f"layer {self.layer}: {_some(self.plain)} {said}"
        for expert, power in self.rescaled.items():
            yield f"layer {self.layer}: expert {expert} overflowed float16; up * 2^-{power}, down * 2^{power}"


def _some(items: tuple[object, ...]) -> str:
    shown = ", ".join(str(i) for i in items[:8])
    return shown + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def make_report(
    layer: int,
    statistics: LayerStatistics,
    powers: Tensor,
    solved: list[tuple[Solved, ...]],
    stacks: Stacks = EXPERT_STACKS,
) -> LayerReport:
    """Findings of a layer from its statistics and the solves of its chunks, stack by stack."""
    count = statistics.expert_in.count
    damped, rounded = [], []
    for index, name in enumerate("+".join(names) for names in stacks):
        damping = torch.cat([part[index].damping for part in solved])
        failed = torch.cat([part[index].rounded for part in solved])
        usual = damping.min()
        damped += [f"{name} of expert {e}" for e in ((damping > usual) & ~failed).nonzero().flatten().tolist()]
        rounded += [f"{name} of expert {e}" for e in failed.nonzero().flatten().tolist()]
    return LayerReport(
        layer,
        tuple((count == 0).nonzero().flatten().tolist()),
        tuple(((count > 0) & (count < LEAST_ROWS)).nonzero().flatten().tolist()),
        tuple(damped),
        tuple(rounded),
        {e: int(powers[e]) for e in powers.nonzero().flatten().tolist()},
        tuple(plainly_rounded(solved, stacks)),
    )


def plainly_rounded(solved: list[tuple[Solved, ...]], stacks: Stacks = EXPERT_STACKS) -> Iterator[str]:
    """Names of the matrices that held-out rows turned away from error feedback."""
    for index, names in enumerate(stacks):
        parts = [part[index].plain for part in solved]
        first = 0
        for plain in parts:
            if plain is None:
                return
            for expert, matrix in plain.nonzero().tolist():
                which = names[matrix] if plain.shape[1] == len(names) else "+".join(names)
                yield f"{which} of expert {first + expert}"
            first += len(plain)
