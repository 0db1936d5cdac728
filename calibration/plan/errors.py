"""The output error of matrices at several types, by the solver that writes files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...quantize.ggml.types import GGMLType
from ..gguf.moments import Pair
from ..gguf.solve import METHODS, experts_at_once, rounded_part

METHOD = replace(METHODS["default"], correct=False)  # of one matrix alone, nothing before it lost anything


@dataclass
class Errors:
    """Sums over the matrices of a group, by type: of all (where every one was rounded), and of the sampled ones."""

    whole: dict[str, float] = field(default_factory=dict)
    sampled: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, errors: Tensor, sampled: Tensor, whole: bool) -> None:
        """errors [E] of some matrices; sampled [E]: which count as the sample; whole: they are all that there are."""
        if whole:
            self.whole[kind] = self.whole.get(kind, 0.0) + float(errors.sum())
        self.sampled[kind] = self.sampled.get(kind, 0.0) + float(errors[sampled].sum())

    def result(self, rows: int) -> dict[str, float]:
        """By type, mean over rows; what was sampled is scaled as a type that was rounded whole."""
        known = [self.whole[kind] / self.sampled[kind] for kind in self.whole if self.sampled[kind] > 0]
        scale = sum(known) / len(known) if known else 1.0
        sums = {kind: self.whole.get(kind, scale * value) for kind, value in self.sampled.items()}
        return {kind: value / max(1, rows) for kind, value in sums.items()}


def output_errors(pair: Pair, part: slice, weight: Tensor, values: Tensor, blocks: int = 1) -> Tensor:
    """[blocks, E] squared error of the outputs [O / blocks each] that `values` [E, O, n] give in place of `weight`.

    Summed over the rows that the matrices saw: by rows held out of the moments; by the moments where there are too few.
    """
    own, _ = METHOD.moments(pair, part)
    difference = weight.float() - values.float()
    moments = ((difference @ own) * difference).sum(2) * pair.weight[part].unsqueeze(1)
    held = pair.held
    if held is not None:
        count = torch.tensor(held.count[part], device=weight.device).clamp(min=1)
        met = pair.rows[part] + count
        by_rows = (held.x[part] @ difference.mT).square().sum(1) * (met / count).unsqueeze(1)
        moments = torch.where(held.enough(part).unsqueeze(1), by_rows, moments)
    return torch.stack([piece.sum(1) for piece in moments.chunk(blocks, 1)])


def rounded_kinds(
    weight: Tensor, kinds: tuple[str, ...], whole: tuple[str, ...], pair: Pair, part: slice, stride: int, blocks: int
) -> Iterator[tuple[str, Tensor, Tensor, slice]]:
    """(type, values, errors [blocks, E'], which of `weight`) for matrices [E, O, n] that are `part` of a pair.

    Types of `whole` are rounded for all of them, others for every `stride`th. blocks: matrices stacked by rows.
    """
    first = -part.start % stride
    for kind in kinds:
        chosen = slice(0, len(weight)) if kind in whole else slice(first, len(weight), stride)
        some, place = weight[chosen], slice(part.start + chosen.start, part.stop, chosen.step)
        if not len(some):
            continue
        _, values, _ = rounded_part(some, GGMLType[kind], pair, place, METHOD, blocks)
        yield kind, values, output_errors(pair, place, some, values, blocks), chosen


def steps(weight: Tensor, kept: range) -> Iterator[slice]:
    """Places of the matrices `kept` that are solved together."""
    step = experts_at_once(weight)
    for start in range(kept.start, kept.stop, step):
        yield slice(start, min(kept.stop, start + step))
