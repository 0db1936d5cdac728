"""Load vectors from arrays, store them, and transpose tiles so that rows lie across a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .lanes import Lanes, Typed, Values

if TYPE_CHECKING:
    from numba.extending import Context

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


def _pointer(
    context: Context, builder: ir.IRBuilder, kind: types.Type, array: ir.Value, offset: ir.Value, target: ir.Type
) -> ir.Value:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), target.as_pointer())


@intrinsic
def load(_typing: object, array: types.Type, offset: types.Type, ls: types.Type) -> Typed:
    """Lanes from a contiguous float32 array, from its element number `offset` on."""

    def generate(context: Context, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        kind = ir.VectorType(_FLOAT, ls.count)
        return builder.load(_pointer(context, builder, array, arguments[0], arguments[1], kind), align=4)

    return Lanes(ls.count)(array, types.intp, ls), generate


@intrinsic
def store(_typing: object, array: types.Type, offset: types.Type, value: types.Type) -> Typed:
    """Lanes into a contiguous array, from `offset` on: float32 as they are, whole numbers as the array's integers."""

    def generate(context: Context, builder: ir.IRBuilder, _signature: object, arguments: Values) -> object:
        lanes, dtype = arguments[2], array.dtype
        if dtype != types.float32:
            wide, narrow = (ir.VectorType(ir.IntType(bits), value.count) for bits in (32, dtype.bitwidth))
            lanes = builder.trunc(builder.fptosi(lanes, wide), narrow)
        pointer = _pointer(context, builder, array, arguments[0], arguments[1], lanes.type)
        builder.store(lanes, pointer, align=max(1, dtype.bitwidth // 8))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def store_half(_typing: object, array: types.Type, offset: types.Type, value: types.Type) -> Typed:
    """The float16 bits of lanes into a contiguous uint16 array."""

    def generate(context: Context, builder: ir.IRBuilder, _signature: object, arguments: Values) -> ir.Value:
        kind = ir.VectorType(ir.HalfType(), value.count)
        half = builder.fptrunc(arguments[2], kind)
        builder.store(half, _pointer(context, builder, array, arguments[0], arguments[1], kind), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def transpose(
    _typing: object, source: types.Type, starts: types.Type, column: types.Type, out: types.Type, ls: types.Type
) -> Typed:
    """L vectors of L float32 of `source`, at starts[i] + column, into the rows column .. column + L of out [K, L]."""

    def generate(context: Context, builder: ir.IRBuilder, _signature: object, arguments: Values) -> object:
        count = ls.count
        kind = ir.VectorType(_FLOAT, count)
        places = context.make_array(starts)(context, builder, arguments[1]).data
        rows: list[ir.Value] = []
        for i in range(count):
            start = builder.load(builder.gep(places, [ir.Constant(ir.IntType(64), i)]))
            pointer = _pointer(context, builder, source, arguments[0], builder.add(start, arguments[2]), kind)
            rows.append(builder.load(pointer, align=4))
        # Each round interleaves row i with row i + L / 2: after log2(L) rounds rows and columns have changed places.
        low, high = ([(i // 2 + half) + (i % 2) * count for i in range(count)] for half in (0, count // 2))
        orders = [ir.Constant(ir.VectorType(_INT, count), order) for order in (low, high)]
        for _ in range(count.bit_length() - 1):
            pairs = [(rows[i], rows[i + count // 2]) for i in range(count // 2)]
            rows = [builder.shuffle_vector(a, b, order) for a, b in pairs for order in orders]
        first = builder.mul(arguments[2], ir.Constant(ir.IntType(64), count))
        for i, row in enumerate(rows):
            offset = builder.add(first, ir.Constant(ir.IntType(64), i * count))
            builder.store(row, _pointer(context, builder, out, arguments[3], offset, kind), align=4)
        return context.get_dummy_value()

    return types.void(source, starts, types.intp, out, ls), generate
