"""SIMD arithmetic for numba: a number type whose values are LLVM vectors of float32.

`Lanes` behave like float32 in compiled code: + - * / and comparisons with other lanes or a float32, lane by lane, and
`where` instead of branches. LLVM's vectorizer makes poor code of the same loops over arrays (bench/RESULTS.md). How
many lanes there are comes as the length of a tuple of ints, `ls`. What takes lanes takes a float32 as well.

numba's cache of compiled functions looks at a function's own file only: touch its users after a change here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from ..ggml.scalar.grid import IQ4_LEVELS

if TYPE_CHECKING:
    from numba.core.typing.templates import Signature

    from .typed import Vector

Emit = Callable[..., ir.Value]
Values = tuple[ir.Value, ...]
Typed = tuple[object, Callable[..., object]]  # numba's signature, and what emits the code

_FLOAT, _HALF, _INT = ir.FloatType(), ir.HalfType(), ir.IntType(32)
_FAST = ("fast",)


class Lanes(types.Type):
    """`count` float32."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(f"Lanes({count})")


class Mask(types.Type):
    """`count` truth values: what comparing lanes gives."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(f"Mask({count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, ir.VectorType(_FLOAT, kind.count))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.count))


def _count(*kinds: types.Type) -> int:
    """Lanes of an operation on these types; 0: they are scalars."""
    return max((kind.count for kind in kinds if isinstance(kind, Lanes | Mask)), default=0)


def _wide(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """A scalar in all lanes; lanes as they are."""
    if not count or isinstance(value.type, ir.VectorType):
        return value
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INT, 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_INT, count), [0] * count)
    )


def _constant(value: float, like: ir.Type) -> ir.Constant:
    if isinstance(like, ir.VectorType):
        return ir.Constant(like, [ir.Constant(like.element, value)] * like.count)
    return ir.Constant(like, value)


def _call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """LLVM's own function `name` of its arguments' type."""
    kind = values[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = builder.module.globals.get(f"llvm.{name}.{suffix}")
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(kind, [kind] * len(values)), f"llvm.{name}.{suffix}")
    return builder.call(function, values, fastmath=_FAST)


def _cast(kind: types.Type) -> types.Type:
    """The type that an argument is brought to: numbers become float32."""
    return kind if isinstance(kind, Lanes | Mask) else types.float32


def _operators(
    kind: type[Lanes | Mask], result: Callable[[int], types.Type], table: Mapping[Callable[..., object], Emit]
) -> None:
    """Let each operator of `kind` (or of one and a number) be what `table` emits, a value of the class `result`."""

    def generic(_self: object, arguments: tuple[types.Type, ...], _keywords: object) -> object:
        known = all(isinstance(a, kind | types.Float) for a in arguments)
        if not known or not any(isinstance(a, kind) for a in arguments):
            return None
        return signature(result(_count(*arguments)), *map(_cast, arguments))

    for symbol, emit in table.items():

        def lowered(
            _context: object,
            builder: ir.IRBuilder,
            signature: Signature,
            arguments: Values,
            emit: Emit = emit,
        ) -> ir.Value:
            return emit(builder, *(_wide(builder, a, signature.return_type.count) for a in arguments))

        infer_global(symbol)(type("Template", (AbstractTemplate,), {"generic": generic}))
        for kinds in ((kind, kind), (kind, types.Float), (types.Float, kind), (kind,)):
            lower_builtin(symbol, *kinds)(lowered)


def _instruction(name: str, *flags: tuple[str, ...]) -> Emit:
    """The builder's instruction `name` of one or two values."""

    def emit(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        return getattr(builder, name)(*values, *flags)

    return emit


def _library(name: str) -> Emit:
    """LLVM's own function `name` of one or two values."""

    def emit(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        return _call(builder, name, *values)

    return emit


def _emit_negative(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.fsub(_constant(-0.0, a.type), a, _FAST)


def _compare(symbol: str) -> Emit:
    def emit(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.fcmp_ordered(symbol, a, b, _FAST)

    return emit


_operators(
    Lanes,
    Lanes,
    {
        operator.add: _instruction("fadd", _FAST),
        operator.sub: _instruction("fsub", _FAST),
        operator.mul: _instruction("fmul", _FAST),
        operator.truediv: _instruction("fdiv", _FAST),
        operator.neg: _emit_negative,
        abs: _library("fabs"),
    },
)
_operators(
    Lanes,
    Mask,
    {
        operator.lt: _compare("<"),
        operator.le: _compare("<="),
        operator.gt: _compare(">"),
        operator.ge: _compare(">="),
        operator.eq: _compare("=="),
    },
)
_operators(
    Mask,
    Mask,
    {
        operator.and_: _instruction("and_"),
        operator.or_: _instruction("or_"),
        operator.invert: _instruction("not_"),
    },
)


def _function(name: str, count: int, emit: Emit) -> Callable[..., Any]:
    """An intrinsic of 1 or 2 lanes or float32."""

    def typed(*kinds: types.Type) -> Typed:
        size = _count(*kinds)
        out = Lanes(size) if size else types.float32

        def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
            return emit(builder, *(_wide(builder, a, size) for a in arguments))

        return out(*map(_cast, kinds)), generate

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
    a = _call(builder, "minnum", _call(builder, "maxnum", a, _constant(-limit, a.type)), _constant(limit, a.type))
    half = ir.VectorType(_HALF, a.type.count) if isinstance(a.type, ir.VectorType) else _HALF
    return builder.fpext(builder.fptrunc(a, half), a.type)


def _emit_uneven(index: bool) -> Emit:
    def emit(builder: ir.IRBuilder, y: ir.Value) -> ir.Value:
        out = _constant(0.0 if index else float(IQ4_LEVELS[0]), y.type)
        for below, level in pairwise(IQ4_LEVELS):
            above = builder.fcmp_ordered(">", y, _constant((below + level) / 2, y.type))
            step = builder.fadd(out, _constant(1.0 if index else float(level - below), y.type), _FAST)
            out = builder.select(above, step, out)
        return out

    return emit


def _integers(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.bitcast(a, ir.VectorType(_INT, a.type.count))


def _emit_e2m1(builder: ir.IRBuilder, y: ir.Value) -> ir.Value:
    """Whole numbers up to 4, one bit behind the leading one from there to 12."""
    size = _call(builder, "fabs", y)
    bits = _integers(builder, size)
    bits = builder.and_(builder.add(bits, _constant(1 << 21, bits.type)), _constant(-1 << 22, bits.type))
    small = builder.fcmp_ordered("<", size, _constant(4.0, y.type))
    size = builder.select(small, _call(builder, "rint", size), builder.bitcast(bits, y.type))
    return _call(builder, "copysign", _call(builder, "minnum", size, _constant(12.0, y.type)), y)


def _emit_exponent(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = _integers(builder, _call(builder, "fabs", a))
    return builder.sitofp(builder.lshr(bits, _constant(23, bits.type)), a.type)


def _emit_power(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    bits = builder.fptosi(a, ir.VectorType(_INT, a.type.count))
    return builder.bitcast(builder.shl(bits, _constant(23, bits.type)), a.type)


def _bitwise(name: str) -> Emit:
    """The builder's instruction on the bits of a float32 and on a whole number that is given as a float32."""

    def emit(builder: ir.IRBuilder, a: ir.Value, number: ir.Value) -> ir.Value:
        whole = builder.fptosi(number, ir.VectorType(_INT, a.type.count))
        return builder.bitcast(getattr(builder, name)(_integers(builder, a), whole), a.type)

    return emit


smaller = _function("smaller", 2, _library("minnum"))
larger = _function("larger", 2, _library("maxnum"))
floor = _function("floor", 1, _library("floor"))
ceil = _function("ceil", 1, _library("ceil"))
nearest_whole = _function("nearest_whole", 1, _library("rint"))
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
            other = builder.shuffle_vector(out, out, ir.Constant(ir.VectorType(_INT, value.count), order))
            sum_of = name.literal_value == "fadd"
            out = builder.fadd(out, other, _FAST) if sum_of else _call(builder, name.literal_value, out, other)
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
                declared = ir.FunctionType(_FLOAT, [kind])
                function = ir.Function(builder.module, declared, full)
            return builder.call(function, (arguments[0],), fastmath=_FAST)

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
        return builder.select(arguments[0], *(_wide(builder, v, mask.count) for v in arguments[1:]))

    return Lanes(mask.count)(mask, a, b), generate


@intrinsic
def filled(_typing: object, value: types.Type, ls: types.Type) -> Typed:
    """A float32 in all lanes."""

    def generate(_context: object, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        return _wide(builder, arguments[0], ls.count)

    return Lanes(ls.count)(types.float32, ls), generate
