"""How widely the scales of a grid type are searched at each effort."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..types import GGMLType
from .grid import FORMS, Form
from .starts import LEVEL_STARTS, RANGE_STARTS

_ROUNDED = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1)
_SPREAD = 0.15  # share by which the largest stored integer of a block may miss the end of its range


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    levels   starting points of a sub-block's step, from the head of the list of a type without a minimum
    eights   the same of Q8_0, where a plain rounding is almost as good: one round is enough, too
    ranges   starting points of step and minimum, from the head of the list of a type with one
    refits   rounds of nearest levels and least squares on the best of them
    supers   candidates of d (and dmin)
    rounds   rounds of refitting the stored integers and d to the levels they give
    plain    where there is no importance, starts of the types that ggml only rounds then, and nothing else is tried;
             0: they are searched as ever
    """

    levels: int = 10
    eights: int = 3
    ranges: int = 16
    refits: int = 1
    supers: int = 32
    rounds: int = 2
    plain: int = 0


EFFORTS = {"fast": Effort(6, 2, 6, 1, 8, 1, 3), "default": Effort(), "high": Effort(32, 32, 32, 2, 64, 4)}


@dataclass(frozen=True)
class Plan:
    """The search of one type, for the kernels.

    tries  [N, 2] float32. With a minimum: (step as a share of the range, steps from the smallest weight up to the
           lowest level); without: (step as a share of the weight of largest magnitude, 0)
    ends   [M] float32: d as a share of the largest step (dmin: of the largest minimum) of the block
    """

    form: Form
    tries: Tensor
    ends: Tensor
    refits: int
    rounds: int


def plan(kind: GGMLType, effort: Effort, weighted: bool = True) -> Plan:
    """What `effort` means for `kind`, with importance or without."""
    form = FORMS[kind]
    if effort.plain and kind in _ROUNDED and not weighted:
        effort = replace(effort, levels=effort.plain, ranges=effort.plain, refits=0, rounds=0)
    if form.minimums is None:
        count = effort.eights if kind is GGMLType.Q8_0 else effort.levels
        tries = [(1 / level, 0.0) for level in LEVEL_STARTS[kind][:count]]
    else:
        top = form.levels[-1]
        cuts = RANGE_STARTS[kind][: effort.ranges]
        tries = [((top - low - high) / top**2, low * top / (top - low - high)) for low, high in cuts]
    refits, rounds = (0, min(1, effort.rounds)) if kind is GGMLType.Q8_0 else (effort.refits, effort.rounds)
    return Plan(form, torch.tensor(tries, dtype=torch.float32), _ends(form, effort), refits, rounds)


def _ends(form: Form, effort: Effort) -> Tensor:
    if form.steps is None:
        return torch.ones(1)
    low, high = form.steps
    stretch = 1 + torch.linspace(-_SPREAD, _SPREAD, effort.supers)
    return 1 / (high * stretch if low == 0 else torch.cat([low * stretch[::2], high * stretch[1::2]]))
