"""The knapsack against brute force; the interpolation of sensitivities."""

from __future__ import annotations

import itertools
import random

import pytest

from mmquant.calibration.plan.knapsack import CARD, HOST, Option, choose, smallest, undominated
from mmquant.calibration.plan.sensitivity import interpolated

Groups = dict[str, list[Option]]


def instance(rng: random.Random, places: tuple[int, ...] = (CARD,)) -> Groups:
    found: Groups = {}
    for layer in range(3):
        for name in ("gate", "down"):
            options = [Option(f"t{i}", rng.randrange(1, 40), rng.random() * 1e-4) for i in range(3)]
            found[f"{layer}.{name}"] = [Option(o.kind, o.bytes, o.cost, p) for o in options for p in places]
    found["head"] = [Option("a", 7, 3e-5), Option("b", 11, 1e-5)]
    return found


def brute(groups: Groups, budgets: list[int], layers: list[list[str]]) -> float | None:
    best = None
    for picked in itertools.product(*groups.values()):
        chosen = dict(zip(groups, picked, strict=True))
        used = [sum(o.bytes for o in picked if o.place == place) for place in range(len(budgets))]
        where = [{chosen[name].place for name in names} for names in layers]
        if any(u > b for u, b in zip(used, budgets, strict=True)) or any(len(w) > 1 for w in where):
            continue
        order = [w.pop() for w in where]
        if order != sorted(order, reverse=True):  # HOST (1) first, then CARD (0)
            continue
        cost = sum(o.cost for o in picked)
        best = cost if best is None or cost < best else best
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_brute_forces(seed: int) -> None:
    rng = random.Random(seed)
    groups = instance(rng)
    least = smallest(groups)
    for budget in (least - 1, least, least + 20, 10**6):
        chosen, wanted = choose(groups, [budget]), brute(groups, [budget], [])
        assert (chosen is None) == (wanted is None)
        if chosen is not None:
            assert sum(o.bytes for o in chosen.values()) <= budget
            assert sum(o.cost for o in chosen.values()) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_two_budgets_place_the_first_layers_on_the_host(seed: int) -> None:
    rng = random.Random(seed)
    groups = instance(rng, (CARD, HOST))
    layers = [[f"{layer}.gate", f"{layer}.down"] for layer in range(3)]
    for budgets in ([30, 60], [7, 500], [60, 20]):
        chosen, wanted = choose(groups, budgets, layers), brute(groups, budgets, layers)
        assert (chosen is None) == (wanted is None)
        if chosen is not None:
            assert sum(o.cost for o in chosen.values()) == pytest.approx(wanted, rel=1e-9)


def test_a_tight_budget_of_real_size_holds_to_the_byte() -> None:
    rng = random.Random(5)
    groups = {
        str(i): [Option(str(b), b * 226492416 + rng.randrange(64), 0.5 ** (b / 2)) for b in range(2, 9)]
        for i in range(200)
    }
    budget = smallest(groups) * 2 + 1
    chosen = choose(groups, [budget])
    assert chosen is not None
    assert 0 <= budget - sum(o.bytes for o in chosen.values()) < 226492416


def test_dominated_options_go() -> None:
    kept = undominated([Option("a", 2, 1.0), Option("b", 3, 1.5), Option("c", 4, 0.5), Option("d", 1, 2.0, HOST)])
    assert [o.kind for o in kept] == ["a", "c", "d"]


def test_interpolation_goes_through_the_probes_and_on_in_proportion() -> None:
    known = [(1e-3, 2e-5), (1e-1, 8e-3)]
    assert interpolated(1e-1, known) == pytest.approx(8e-3)
    assert interpolated(1e-2, known) == pytest.approx((2e-5 * 8e-3) ** 0.5)  # half-way in the logarithms
    assert interpolated(1e-5, known) == pytest.approx(2e-7)
    assert interpolated(1e0, known) > 8e-3
    assert interpolated(0.0, known) == 0
