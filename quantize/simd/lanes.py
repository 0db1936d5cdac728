"""The number type of `vectors`: LLVM vectors of float32 for numba, their arithmetic and comparisons."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

if TYPE_CHECKING:
    from numba.core.typing.templates import Signature


Emit = Callable[..., ir.Value]
Values = tuple[ir.Value, ...]
Typed = tuple[object, Callable[..., object]]  # numba's signature, and what emits the code
FLOAT, HALF, INT = ir.FloatType(), ir.HalfType(), ir.IntType(32)
FAST = ("fast",)


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
        super().__init__(manager, kind, ir.VectorType(FLOAT, kind.count))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.count))


def lanes_in(*kinds: types.Type) -> int:
    """Lanes of an operation on these types; 0: they are scalars."""
    return max((kind.count for kind in kinds if isinstance(kind, Lanes | Mask)), default=0)


def widened(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """A scalar in all lanes; lanes as they are."""
    if not count or isinstance(value.type, ir.VectorType):
        return value
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(INT, 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(INT, count), [0] * count)
    )


def constant(value: float, like: ir.Type) -> ir.Constant:
    """The value as this type, in all lanes."""
    if isinstance(like, ir.VectorType):
        return ir.Constant(like, [ir.Constant(like.element, value)] * like.count)
    return ir.Constant(like, value)


def llvm_call(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """LLVM's own function `name` of its arguments' type."""
    kind = values[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = builder.module.globals.get(f"llvm.{name}.{suffix}")
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(kind, [kind] * len(values)), f"llvm.{name}.{suffix}")
    return builder.call(function, values, fastmath=FAST)


def as_lanes(kind: types.Type) -> types.Type:
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
        return signature(result(lanes_in(*arguments)), *map(as_lanes, arguments))

    for symbol, emit in table.items():

        def lowered(
            _context: object,
            builder: ir.IRBuilder,
            signature: Signature,
            arguments: Values,
            emit: Emit = emit,
        ) -> ir.Value:
            return emit(builder, *(widened(builder, a, signature.return_type.count) for a in arguments))

        infer_global(symbol)(type("Template", (AbstractTemplate,), {"generic": generic}))
        for kinds in ((kind, kind), (kind, types.Float), (types.Float, kind), (kind,)):
            lower_builtin(symbol, *kinds)(lowered)


def _instruction(name: str, *flags: tuple[str, ...]) -> Emit:
    """The builder's instruction `name` of one or two values."""

    def emit(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        return getattr(builder, name)(*values, *flags)

    return emit


def library(name: str) -> Emit:
    """LLVM's own function `name` of one or two values."""

    def emit(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value:
        return llvm_call(builder, name, *values)

    return emit


def _emit_negative(builder: ir.IRBuilder, a: ir.Value) -> ir.Value:
    return builder.fsub(constant(-0.0, a.type), a, FAST)


def _compare(symbol: str) -> Emit:
    def emit(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.fcmp_ordered(symbol, a, b, FAST)

    return emit


_operators(
    Lanes,
    Lanes,
    {
        operator.add: _instruction("fadd", FAST),
        operator.sub: _instruction("fsub", FAST),
        operator.mul: _instruction("fmul", FAST),
        operator.truediv: _instruction("fdiv", FAST),
        operator.neg: _emit_negative,
        abs: library("fabs"),
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
