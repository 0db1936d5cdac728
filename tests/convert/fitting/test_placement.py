"""Budgets add up; figures that others measured or reported come out."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.m27 import M27, PRUNED
from mmquant.convert.fitting import memory
from mmquant.convert.fitting.budgets import weight_budgets
from mmquant.convert.fitting.catalog import find_rows, rows
from mmquant.convert.fitting.placement import split_layers
from mmquant.convert.fitting.targets import find_target, machine, ram_bytes, read_targets
from mmquant.convert.fitting.verdict import NO, TIGHT, YES, Fit, check_context, fit
from mmquant.errors import InputError

GIB = 1 << 30
TARGETS = read_targets()


def of(type: str, target: str, context: int | None = None, cache: str = "f16") -> Fit:
    return fit(find_rows(type)[0], M27, find_target(target, TARGETS), context=context, cache=cache)


@pytest.mark.parametrize("type", ["IQ2_M", "Q4_K_M", "int4-g128", "fp8-block", "BF16"])
@pytest.mark.parametrize("target", list(TARGETS))
def test_every_byte_is_somewhere(type: str, target: str) -> None:
    found = of(type, target)
    place = found.placement
    if found.reason:
        assert found.verdict == NO
        return
    assert abs(sum(d.weights for d in place.devices) - found.weights.total) <= len(place.devices)
    kv = memory.kv_bytes(M27, place.context, place.cache)
    assert kv <= sum(d.kv for d in place.devices) + len(place.devices)
    for device in place.devices:
        assert device.used == device.weights + device.kv + device.compute + device.staging + device.runtime
        assert device.margin == device.usable - device.used
    assert (found.verdict == YES) == (place.margin >= GIB)
    assert (found.verdict == NO) == (place.margin < 0) == (found.missing > 0)
    assert bool(found.context) == (found.verdict != NO) == (found.tokens_per_second > 0)


@pytest.mark.parametrize("target", ["24GB+96GB", "2x24GB+96GB", "2xA100-80GB", "128GB-unified"])
@pytest.mark.parametrize("type", ["IQ3_XXS", "Q3_K_M", "int4-g64"])
def test_the_context_is_the_largest_that_leaves_a_gibibyte(type: str, target: str) -> None:
    found = of(type, target)
    if found.verdict != YES:
        return
    larger = [c for c in memory.CONTEXTS if c > found.context]
    assert all(of(type, target, context).verdict != YES for context in larger)


def test_iq3_xxs_on_a_24_gb_card_at_32k() -> None:
    """53 layers in RAM, as the reference's table has it; one fewer would not leave 1 GiB."""
    found = of("IQ3_XXS", "24GB+96GB", 32768)
    assert (found.verdict, found.placement.cpu_layers) == (YES, 53)


@pytest.mark.parametrize(
    ("type", "ram", "verdict"),
    [("Q4_K_M", "24GB+96GB", NO), ("Q3_K_M", "24GB+128GB", YES), ("IQ4_XS", "24GB+128GB", YES)],
)
def test_which_ram_a_type_needs(type: str, ram: str, verdict: str) -> None:
    assert of(type, ram, 32768).verdict == verdict


def test_a_24_gb_card_alone_holds_nothing() -> None:
    assert all(fit(row, M27, TARGETS["24GB"]).verdict == NO for row in rows())


def test_fp8_of_m27_does_not_fit_two_a100() -> None:
    found = of("fp8-block", "2xA100-80GB")
    assert (found.verdict, found.context) == (NO, 0)
    assert found.missing > 70 * 10**9


def test_int4_on_two_a100_holds_what_vllm_reported() -> None:
    """90 to 103 thousand tokens of bf16 cache at a share of 0.92 with 3 to 4.5 GiB beside: 64K, not 96K."""
    assert of("int4-g128", "2xA100-80GB").context == 65536
    free = of("int4-g128", "2xA100-80GB", 8192).placement.devices[0]
    tokens = 8192 + free.margin // (memory.kv_table(M27)["f16"] // 2)
    assert 88_000 < tokens < 106_000
    assert of("int4-g128", "2xA100-80GB", cache="fp8").context == 131072


def test_groups_that_tensor_parallelism_would_cut_keep_experts_whole() -> None:
    assert of("int4-g128", "8xH100-80GB").placement.expert_parallel  # 1536 / 8 = 192
    assert not of("int4-g64", "8xH100-80GB").placement.expert_parallel
    assert not of("int4-g128", "4xH100-80GB").placement.expert_parallel
    assert of("fp8-block", "8xH100-80GB").placement.expert_parallel
    odd = fit(find_rows("int4-g128")[0], dataclasses.replace(M27, experts=250), TARGETS["8xH100-80GB"])
    assert (odd.verdict, "not a multiple of the group size" in odd.reason) == (NO, True)
    three = fit(find_rows("int4-g128")[0], M27, machine("80GBx3", "128GB"))
    assert (three.verdict, three.reason) == (NO, "8 key-value heads do not divide over 3 cards")


def test_kv_cache_of_m27() -> None:
    assert memory.kv_table(M27) == {"f16": 253952, "fp8": 126976, "q8_0": 134912, "q4_0": 71424}
    assert memory.kv_bytes(M27, 65536, "f16") == 15872 << 20
    assert memory.kv_bytes(M27, 65536, "q8_0") == 8432 << 20


def test_a_pruned_model_is_smaller() -> None:
    row = find_rows("Q4_K_M")[0]
    assert row.weigh(PRUNED).experts * 4 == row.weigh(M27).experts * 3
    assert fit(row, PRUNED, TARGETS["24GB+96GB"]).verdict != NO


def test_decode_speed_is_a_bound() -> None:
    """EPYC and dual-channel machines report 8 to 20 tokens a second for such files: never more than the bound."""
    assert 20 < of("IQ4_XS", "24GB+128GB", 32768).tokens_per_second < 40
    assert of("IQ2_M", "4x24GB+96GB", 8192).tokens_per_second > 65  # six 3090 reported 65 and more


def test_split_layers_is_the_best_split() -> None:
    for sizes, head, count in [([3, 1, 4, 1, 5, 9, 2], 2, 3), ([5] * 7, 1, 2), ([1], 1, 4), ([9, 1, 1, 1], 0, 2)]:
        runs = split_layers(sizes, head, count)
        assert (len(runs), sum(runs)) == (count, len(sizes))
        assert largest(sizes, head, runs) == min(
            largest(sizes, head, other) for other in compositions(len(sizes), count)
        )


def largest(sizes: list[int], head: int, runs: list[int]) -> int:
    sums, first = [], 0
    for run in runs:
        sums.append(sum(sizes[first : first + run]))
        first += run
    return max([*sums[:-1], sums[-1] + head])


def compositions(total: int, parts: int) -> list[list[int]]:
    if parts == 1:
        return [[total]]
    return [[first, *rest] for first in range(total + 1) for rest in compositions(total - first, parts - 1)]


def test_budgets_of_a_plan_are_what_a_placement_uses() -> None:
    target = TARGETS["24GB+96GB"]
    budget = weight_budgets(M27, target, 32768)
    found = of("IQ3_XXS", "24GB+96GB", 32768).placement
    assert abs(budget.cards - found.devices[0].weights) < GIB
    assert found.devices[1].weights <= budget.ram
    assert weight_budgets(M27, TARGETS["128GB-unified"], 32768).cards == 0


def test_sizes_of_machines() -> None:
    assert ram_bytes("96GB") == 96 * GIB
    assert (ram_bytes("98GB"), ram_bytes("98GiB"), ram_bytes("98e9")) == (98 * 10**9, 98 * GIB, 98 * 10**9)
    assert machine("24GBx2", "96GB").cards == find_target("2x24gb+96gb", TARGETS).cards
    assert machine("24e9", None).cards.memory == 24 * 10**9  # type: ignore[union-attr]
    assert machine("12GB", None).cards.memory == 12 * GIB  # type: ignore[union-attr]
    for target in read_targets().values():
        assert target.cards is None or 0.95 * target.cards.memory < target.cards.usable < target.cards.memory, target.id
    for bad in ("24GBx0", "24GBx65", "abc", "24GBx", "0GB"):
        with pytest.raises(InputError, match="--gpu"):
            machine(bad, None)
    with pytest.raises(InputError, match=r"--ram: 'lots', expected a size"):
        machine(None, "lots")
    with pytest.raises(InputError, match="--gpu: 24 is 24 bytes, expected a size with its unit such as 24GB"):
        machine("24", "96GB")
    with pytest.raises(InputError, match="--ram: 96 is 96 bytes, expected a size with its unit"):
        machine("24GB", "96")
    assert machine("1000000", "1MB").ram == 10**6


def test_unknown_targets_name_the_close_ones() -> None:
    with pytest.raises(InputError, match=r"--target 24GB\+69GB: unknown, did you mean 24GB\+"):
        find_target("24GB+69GB", TARGETS)
    with pytest.raises(InputError, match="--context 200000: expected 1 to 196608"):
        check_context(200000, M27)
    assert TIGHT == of("IQ4_XS", "32GB+96GB").verdict
