"""Panels of columns, and what error feedback asks of a grid: their codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .grid import IntWeight


@dataclass(frozen=True)
class Panel:
    """Neighbouring columns of E matrices in processing order, all [E, P, O] with outputs contiguous.

    part        with the errors of the columns behind the panel fed in; becomes what was rounded
    columns     as they came
    triangle    [E, P, P] of the feedback's lower factor; None: no errors are fed back
    importance  [E, P] that weighs the squared errors of a column
    place       [E, P / group]: the original group at each place
    codes       int8, filled; errors: filled (None without a triangle)
    """

    part: Tensor
    columns: Tensor
    triangle: Tensor | None
    importance: Tensor
    place: Tensor
    codes: Tensor
    errors: Tensor | None


class Grid(Protocol):
    """What codes and scales may be. Error feedback and the calibrated folders work on any grid.

    bits        of a code
    group_size  weights that share a scale; -1: a row
    symmetric   neither zero points nor biases
    """

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        ...

    @property
    def shared(self) -> bool:
        """Whether matrices that an engine fuses (gate and up; q, k and v) must be solved together."""
        ...

    @property
    def panel(self) -> int:
        """Columns that one matrix product brings up to date, at most."""
        ...

    def searches_first(self, group: int) -> bool:
        """Whether scales of groups this wide are searched before the sweep."""
        ...

    def round_panel(self, panel: Panel, found: Tensor, zeros: Tensor | None, search: bool) -> None:
        """Round a panel from its last column to its first; scales (and zeros) [E, G, O] by original group.

        They are filled where `search`, else used.
        """
        ...

    def finish(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> IntWeight:
        """The matrices [E, O, I] as they can be stored."""
        ...

    def round_nearest(self, weight: Tensor, importance: Tensor | None) -> IntWeight:
        """Nearest codes of weight [E, O, I] under searched scales; importance [E, I] weighs a column's error."""
        ...

    def refit(self, weight: Tensor, solved: Solved, second: Tensor) -> Solved:
        """Improve what error feedback found of weight [E, O, I]; second [E, I, I] mean second moments."""
        ...


@dataclass(frozen=True)
class Solved:
    """Quantized matrices and how they came about.

    compensated [E, O, I] float32: what was rounded (None unless asked); damping [E]: share of the mean diagonal that
    was added; rounded [E] bool: no factorization was possible and the matrix was rounded to nearest; plain
    [E, matrices] bool: so were these, since held-out rows say that feedback errs more (None: not asked).
    """

    weight: IntWeight
    compensated: Tensor | None
    damping: Tensor
    rounded: Tensor
    plain: Tensor | None = None


def take(table: Tensor, place: Tensor) -> Tensor:
    """Row place[e] of each expert's table [E, G, O] -> [E, O]."""
    return table[torch.arange(len(place), device=place.device), place]


def put(table: Tensor, place: Tensor, values: Tensor) -> None:
    """Row place[e] of each expert's table [E, G, O] becomes values [E, O]."""
    table[torch.arange(len(place), device=place.device), place] = values
