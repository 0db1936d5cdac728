"""The choice itself: a multiple-choice knapsack, solved exactly by HiGHS (scipy.optimize.milp).

Every group takes one of its options; the bytes of each place (card, host) stay within its budget, and the sum of costs
is least. Layers of experts move as a whole, the first ones to the host, as llama.cpp's --n-cpu-moe N has it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

CARD, HOST = 0, 1  # places; with one budget everything lies in place 0
SCALE = 1e6  # costs and bytes are scaled to this, far above HiGHS' absolute tolerances


@dataclass(frozen=True)
class Option:
    """A group at a type in a place: bytes that it takes there, cost that it adds (nats of KLD)."""

    kind: str
    bytes: int
    cost: float
    place: int = 0


def choose(
    groups: Mapping[str, Sequence[Option]], budgets: Sequence[int], layers: Sequence[Sequence[str]] = ()
) -> dict[str, Option] | None:
    """The cheapest choice within the budgets (bytes by place), None where there is none.

    layers: groups that share their place, in order; where one layer lies on the card so do all after it.
    """
    columns = [(name, option) for name, options in groups.items() for option in options]
    cost = np.array([option.cost for _, option in columns])
    top = max(float(np.abs(cost).max(initial=0.0)), 1e-300)
    limits = [int(budget) for budget in budgets]
    for _ in range(8):  # until the integer sums hold: a solver's rows have a tolerance
        rows = _rows(columns, groups, limits, layers)
        goal, whole = cost / top * SCALE, np.ones(len(columns))
        with _unheard():
            found = milp(goal, integrality=whole, bounds=(0, 1), constraints=rows, options={"mip_rel_gap": 0.0})
        if found.x is None:
            return None
        chosen = {name: option for (name, option), taken in zip(columns, found.x, strict=True) if taken > 0.5}
        used = [sum(o.bytes for o in chosen.values() if o.place == place) for place in range(len(limits))]
        over = [max(0, have - budget) for have, budget in zip(used, budgets, strict=True)]
        if not any(over):
            return chosen
        limits = [limit - more for limit, more in zip(limits, over, strict=True)]
    return None


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what HiGHS prints from C though its log is off: standard output is the command's own."""
    flush = getattr(ctypes.CDLL(None), "fflush", None) if os.name == "posix" else None
    if flush is None:
        yield
        return
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        flush(None)
        os.dup2(nothing, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def smallest(groups: Mapping[str, Sequence[Option]]) -> int:
    """Bytes of all groups at their smallest types."""
    return sum(min(option.bytes for option in options) for options in groups.values())


def undominated(options: Sequence[Option]) -> list[Option]:
    """Without those that another one in the same place beats in bytes and cost."""
    ordered = sorted(options, key=lambda o: (o.place, o.bytes, o.cost))
    kept: list[Option] = []
    for option in ordered:
        if not kept or kept[-1].place != option.place or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _rows(
    columns: list[tuple[str, Option]],
    groups: Mapping[str, Sequence[Option]],
    budgets: Sequence[int],
    layers: Sequence[Sequence[str]],
) -> LinearConstraint:
    place = np.array([option.place for _, option in columns])
    size = np.array([option.bytes for _, option in columns], dtype=np.float64)
    of = np.array([list(groups).index(name) for name in groups for _ in groups[name]])
    number = {name: index for index, name in enumerate(groups)}
    parts: list[tuple[NDArray[np.float64], float, float]] = []
    for index in range(len(groups)):
        parts.append(((of == index).astype(np.float64), 1.0, 1.0))
    for index, budget in enumerate(budgets):
        unit = SCALE / max(1, budget)
        parts.append((np.where(place == index, size * unit, 0.0), -np.inf, budget * unit))
    on_card = {name: ((of == number[name]) & (place == CARD)).astype(np.float64) for names in layers for name in names}
    for names in layers:
        parts += [(on_card[name] - on_card[names[0]], 0.0, 0.0) for name in names[1:]]
    for before, after in pairwise(layers):
        parts.append((on_card[before[0]] - on_card[after[0]], -np.inf, 0.0))
    matrix = csr_array(np.stack([row for row, _, _ in parts]))
    low, high = (np.array([part[side] for part in parts]) for side in (1, 2))
    return LinearConstraint(matrix, low, high)  # pyright: ignore[reportArgumentType]
