"""SIMD vector operations in compiled code equal NumPy on the same numbers."""

# pyright: reportCallIssue=false

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from mmquant.quantize.ggml.scalar.grid import IQ4_LEVELS, MXFP4_LEVELS
from mmquant.quantize.simd import vectors as ops
from mmquant.quantize.simd.memory import load, store, store_half, transpose

SIXTEEN = (0,) * 16
NUMBERS = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32) * 5


def through(function: Callable[..., Any], *arrays: np.ndarray, out: Any = np.float32) -> np.ndarray:
    """`function` of the lanes of one array or two, compiled; sixteen numbers at a time."""
    compiled = numba.njit(function)
    result = np.zeros(arrays[0].shape, out)
    if len(arrays) == 1:

        @numba.njit
        def run(a, result):  # type: ignore[no-untyped-def]
            for i in range(0, a.size, 16):
                store(result, i, compiled(load(a, i, SIXTEEN)))
    else:

        @numba.njit
        def run(a, b, result):  # type: ignore[no-untyped-def]
            for i in range(0, a.size, 16):
                store(result, i, compiled(load(a, i, SIXTEEN), load(b, i, SIXTEEN)))

    run(*arrays, result)
    return result


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_arithmetic(name: str) -> None:
    function = getattr(operator, name)
    a, b = NUMBERS[:2]
    assert np.allclose(through(lambda x, y: function(x, y), a, b), function(a, b), rtol=1e-6)
    two = np.float32(2)
    assert np.allclose(through(lambda x: function(x, two), a), function(a, two), rtol=1e-6)
    assert np.allclose(through(lambda x: function(two, x), a), function(two, a), rtol=1e-6)
    assert np.array_equal(through(lambda x: abs(-x), a), abs(a))


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq"])
def test_comparisons_choose(name: str) -> None:
    compare = getattr(operator, name)
    a, b = NUMBERS[0].copy(), NUMBERS[1].copy()
    b[3:6] = a[3:6]
    zero = np.float32(0)
    assert np.array_equal(through(lambda x, y: ops.where(compare(x, y), x, zero), a, b), np.where(compare(a, b), a, 0))
    both = through(lambda x, y: ops.where(compare(x, y) & ~(x > zero) | (y < zero), x, y), a, b)
    assert np.array_equal(both, np.where(compare(a, b) & ~(a > 0) | (b < 0), a, b))


def test_functions() -> None:
    a, b = NUMBERS[:2]
    for ours, theirs in ((ops.smaller, np.minimum), (ops.larger, np.maximum)):
        assert np.array_equal(through(lambda x, y, f=ours: f(x, y), a, b), theirs(a, b))
    for ours, theirs in ((ops.nearest_whole, np.rint), (ops.floor, np.floor), (ops.ceil, np.ceil)):
        assert np.array_equal(through(lambda x, f=ours: f(x), a), theirs(a))
        assert numba.njit(lambda x, f=ours: f(x))(np.float32(2.7)) == theirs(2.7)
    assert np.array_equal(through(lambda x: ops.filled(np.float32(3), x), a), np.full(16, 3, np.float32))
    assert np.array_equal(through(lambda x: x, np.rint(a), out=np.int16), np.rint(a).astype(np.int16))


@pytest.mark.parametrize("count", [8, 16])
def test_the_first_lane_that_holds(count: int) -> None:
    lanes = (0,) * count

    @numba.njit
    def run(a, level):  # type: ignore[no-untyped-def]
        return ops.first_of(load(a, 0, lanes) > level)

    for place in range(count):
        a = np.where(np.arange(count) < place, 0, 1).astype(np.float32)
        assert run(a, np.float32(0.5)) == place
    assert run(np.zeros(count, np.float32), np.float32(0.5)) == count


def test_float16() -> None:
    a = NUMBERS[0] * np.float32(10.0) ** np.arange(-9, 7, dtype=np.float32)
    expected = np.clip(a, -65504, 65504).astype(np.float16)
    assert np.array_equal(through(lambda x: ops.rounded(x), a), expected.astype(np.float32))
    bits = np.zeros(16, np.uint16)
    numba.njit(lambda x, out: store_half(out, 0, ops.rounded(load(x, 0, SIXTEEN))))(a, bits)
    assert np.array_equal(bits, expected.view(np.uint16))


@pytest.mark.parametrize("levels, function", [(IQ4_LEVELS, ops.uneven_level), (MXFP4_LEVELS, ops.e2m1)])
def test_uneven_levels_are_the_nearest(levels: tuple[int, ...], function: Any) -> None:
    table = np.array(levels, np.float32)
    y = np.linspace(1.3 * table[0], 1.3 * table[-1], 16 * 40, dtype=np.float32)
    found = through(lambda x: function(x), y)
    assert np.allclose(np.abs(found - y), np.abs(y[:, None] - table).min(1), atol=1e-5)
    assert np.isin(found, table).all()
    if function is ops.uneven_level:
        assert np.array_equal(table[through(lambda x: ops.uneven_index(x), y, out=np.uint8)], found)


def test_powers_of_two() -> None:
    a = np.ldexp(NUMBERS[0], np.arange(-60, 68, 8)).astype(np.float32)
    bits = through(lambda x: ops.exponent(x), a)
    assert np.array_equal(bits, np.frexp(a)[1] + 126)
    assert np.array_equal(through(lambda x: ops.power(x), bits), np.ldexp(np.float32(1), bits.astype(int) - 127))


@pytest.mark.parametrize("group", [1, 2, 8, 16])
def test_what_belongs_to_a_group_is_in_all_its_lanes(group: int) -> None:
    a, subs = NUMBERS[0], (0,) * group
    for name, theirs in (("fadd", np.sum), ("minnum", np.min), ("maxnum", np.max)):
        ours = through(
            {
                "fadd": lambda x: ops.within(x, subs, "fadd"),
                "minnum": lambda x: ops.within(x, subs, "minnum"),
                "maxnum": lambda x: ops.within(x, subs, "maxnum"),
            }[name],
            a,
        )
        assert np.allclose(ours, np.repeat(theirs(a.reshape(-1, group), axis=1), group), rtol=1e-5)


@pytest.mark.parametrize("count", [2, 8, 16])
def test_rows_come_to_lie_across_the_lanes(count: int) -> None:
    lanes = (0,) * count
    source = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    starts = np.random.default_rng(2).permutation(50)[:count] * 32
    out = np.zeros((32, count), np.float32)

    @numba.njit
    def run(source, starts, out):  # type: ignore[no-untyped-def]
        for column in range(0, 32, len(lanes)):
            transpose(source, starts, column, out, lanes)

    run(source, starts, out)
    assert np.array_equal(out, source[starts // 32].T)
