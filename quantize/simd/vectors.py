"""SIMD arithmetic for numba: a number type whose values are LLVM vectors of float32.

`Lanes` behave like float32 in compiled code: + - * / and comparisons with other lanes or a float32, lane by lane, and
`where` instead of branches. LLVM's vectorizer makes poor code of the same loops over arrays (bench/RESULTS.md). How
many lanes there are comes as the length of a tuple of ints, `ls`. What takes lanes takes a float32 as well.

numba's cache of compiled functions looks at a function's own file only: touch its users after a change here or in
`lanes`, which has the type.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..ggml.scalar.grid import IQ4_LEVELS
from .lanes import (
    FAST,
    FLOAT,
    HALF,
    INT,
    Emit,
    Lanes,
    Typed,
    Values,
    as_lanes,
    constant,
    lanes_in,
    library,
    llvm_call,
    widened,
)

if TYPE_CHECKING:
    from .typed import Vector


def _function(name: str, count: int, emit: Emit) -> Callable[..., Any]:
    """An intrinsic of 1 or 2 lanes or float32."""

    def typed(*kinds: types.Type) -> Typed:
        size = lanes_in(*kinds)
        out = Lanes(size) if size else types.float32

        def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
            return emit(builder, *(widened(builder, a, size) for a in arguments))

        return out(*map(as_lanes, kinds)), generate

    def one(_typing: object, a: types.Type) -> Typed:
        return typed(a)

    def two(_typing: object, a: types.Type, b: types.Type) -> Typed:
        return typed(a, b)

    chosen = one if count == 1 else two
    chosen.__name__ = name
    return intrinsic(chosen)


def _emit_rounded(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    """Clamped, to float16 and back."""
    limit = 65504.0
    a = llvm_call(builder, "minnum", llvm_call(builder, "maxnum", a, constant(-limit, a.type)), constant(limit, a.type))
    half = ir.VectorType(HALF, a.type.count) if isinstance(a.type, ir.VectorType) else HALF
    return builder.fpext(builder.fptrunc(a, half), a.type)


def _emit_uneven(index: bool) -> Emit:
    def emit(builder: ir.IRBuilder, y: ir.Value) -> ir.Value:
        out = constant(0.0 if index else float(IQ4_LEVELS[0]), y.type)
        for below, level in pairwise(IQ4_LEVELS):
            above = builder.fcmp_ordered(">", y, constant((below + level) / 2, y.type))
            step = builder.fadd(out, constant(1.0 if index else float(level - below), y.type), FAST)
            out = builder.select(above, step, out)
        return out

    return emit


def _integers(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.bitcast(a, ir.VectorType(INT, a.type.count))


def _emit_e2m1(builder: ir.IRBuilder, y: ir.Value) -> ir.Value:
    """Whole numbers up to 4, one bit behind the leading one from there to 12."""
    size = llvm_call(builder, "fabs", y)
    bits = _integers(builder, size)
    bits = builder.and_(builder.add(bits, constant(1 << 21, bits.type)), constant(-1 << 22, bits.type))
    small = builder.fcmp_ordered("<", size, constant(4.0, y.type))
    size = builder.select(small, llvm_call(builder, "rint", size), builder.bitcast(bits, y.type))
    return llvm_call(builder, "copysign", llvm_call(builder, "minnum", size, constant(12.0, y.type)), y)


def _emit_exponent(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = _integers(builder, llvm_call(builder, "fabs", a))
    return builder.sitofp(builder.lshr(bits, constant(23, bits.type)), a.type)


def _emit_power(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = builder.fptosi(a, ir.VectorType(INT, a.type.count))
    return builder.bitcast(builder.shl(bits, constant(23, bits.type)), a.type)


def _bitwise(name: str) -> Emit:
    """The builder's instruction on the bits of a float32 and on a whole number that is given as a float32."""

    def emit(builder: ir.IRBuilder, a: ir.Value, number: ir.Value) -> ir.Value:
        whole = builder.fptosi(number, ir.VectorType(INT, a.type.count))
        return builder.bitcast(getattr(builder, name)(_integers(builder, a), whole), a.type)

    return emit


smaller = _function("smaller", 2, library("minnum"))
larger = _function("larger", 2, library("maxnum"))
floor = _function("floor", 1, library("floor"))
ceil = _function("ceil", 1, library("ceil"))
nearest_whole = _function("nearest_whole", 1, library("rint"))
rounded = _function("rounded", 1, _emit_rounded)  # to the nearest finite float16
uneven_level = _function("uneven_level", 1, _emit_uneven(False))  # the nearest of IQ4's levels
uneven_index = _function("uneven_index", 1, _emit_uneven(True))  # its index
e2m1 = _function("e2m1", 1, _emit_e2m1)  # the nearest of MXFP4's levels
exponent = _function("exponent", 1, _emit_exponent)  # the exponent's bits
power = _function("power", 1, _emit_power)  # the float32 with these exponent's bits
masked_bits = _function("masked_bits", 2, _bitwise("and_"))  # the float32 whose bits a mask (-2^k) lets through
added_bits = _function("added_bits", 2, _bitwise("add"))  # the float32 whose bits are so many further


@intrinsic(prefer_literal=True)
def within(_typing: object, value: types.Type, group: types.Type, name: types.Type) -> Typed:
    """In each lane what `name` ("fadd", "minnum", "maxnum") makes of the lanes of its group, len(group) neighbours."""

    def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        out, distance = arguments[0], 1
        while distance < group.count:
            order = [i ^ distance for i in range(value.count)]
            other = builder.shuffle_vector(out, out, ir.Constant(ir.VectorType(INT, value.count), order))
            sum_of = name.literal_value == "fadd"
            out = builder.fadd(out, other, FAST) if sum_of else llvm_call(builder, name.literal_value, out, other)
            distance *= 2
        return out

    return value(value, group, name), generate


def _over_lanes(name: str, intrinsic_name: str) -> Callable[[Vector], np.float32]:
    """An intrinsic from lanes to one float32."""

    def typed(_typing: object, a: types.Type) -> Typed:
        def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
            kind = arguments[0].type
            full = f"llvm.vector.reduce.{intrinsic_name}.v{kind.count}f32"
            function = builder.module.globals.get(full)
            if function is None:
                declared = ir.FunctionType(FLOAT, [kind])
                function = ir.Function(builder.module, declared, full)
            return builder.call(function, (arguments[0],), fastmath=FAST)

        return types.float32(a), generate

    typed.__name__ = name
    return intrinsic(typed)


least_of = _over_lanes("least_of", "fmin")  # the least lane


@intrinsic
def first_of(_typing: object, mask: types.Type) -> Typed:
    """The number of the first lane in which the mask holds; the count of lanes where there is none."""

    def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        bits = builder.bitcast(arguments[0], ir.IntType(mask.count))
        return builder.zext(builder.cttz(bits, ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.int64(mask), generate


@intrinsic
def where(_typing: object, mask: types.Type, a: types.Type, b: types.Type) -> Typed:
    """a where the mask holds, else b."""

    def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        return builder.select(arguments[0], *(widened(builder, v, mask.count) for v in arguments[1:]))

    return Lanes(mask.count)(mask, a, b), generate


@intrinsic
def filled(_typing: object, value: types.Type, ls: types.Type) -> Typed:
    """A float32 in all lanes."""

    def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        return widened(builder, arguments[0], ls.count)

    return Lanes(ls.count)(types.float32, ls), generate
