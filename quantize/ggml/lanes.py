"""Arithmetic on K float32 at a time for the numba search: whole vectors, written in LLVM's own language.

The search spends its time on loops over 16 or 32 columns that end in a few sums, of which LLVM's vectorizer makes poor
code (3 to 6 times slower, bench/RESULTS.md). Each function here is one straight line of vector operations over the
first K elements of contiguous float32 arrays; K is the length of the tuple `ks`. `minimum` is None or True; `uneven` is
None for whole-numbered levels, or a tuple whose length picks the table of levels: 1 IQ4, 2 MXFP4.

numba's cache of compiled functions looks at the file of a function only: touch `search_cpu.py` after a change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .grid import IQ4_LEVELS, MXFP4_LEVELS

_TABLES = {1: IQ4_LEVELS, 2: MXFP4_LEVELS}

_FLOAT, _INT32, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FAST = ("fast",)


@dataclass(frozen=True)
class _Vectors:
    """Emits operations on vectors of K floats."""

    context: Any
    builder: Any
    size: int

    @property
    def kind(self) -> ir.VectorType:
        return ir.VectorType(_FLOAT, self.size)

    def pointer(self, array_type: Any, value: Any, kind: Any) -> Any:
        data = self.context.make_array(array_type)(self.context, self.builder, value).data
        return self.builder.bitcast(data, kind.as_pointer())

    def load(self, array_type: Any, value: Any) -> Any:
        out = self.builder.load(self.pointer(array_type, value, self.kind))
        out.align = 4
        return out

    def splat(self, scalar: Any) -> Any:
        empty = ir.Constant(self.kind, ir.Undefined)
        one = self.builder.insert_element(empty, scalar, ir.Constant(_INT32, 0))
        return self.builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(_INT32, self.size), [0] * self.size))

    def constant(self, value: float) -> Any:
        return ir.Constant(self.kind, [ir.Constant(_FLOAT, float(value))] * self.size)

    def call(self, name: str, *vectors: Any) -> Any:
        kind = ir.FunctionType(self.kind, [self.kind] * len(vectors))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{self.size}f32")
        return self.builder.call(function, vectors, fastmath=_FAST)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, _FAST)

    def subtract(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, _FAST)

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, _FAST)

    def total(self, a: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOAT, self.kind])
        name = f"llvm.vector.reduce.fadd.v{self.size}f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, (ir.Constant(_FLOAT, 0.0), a), fastmath=_FAST)

    def extreme(self, a: Any, name: str) -> Any:
        kind = ir.FunctionType(_FLOAT, [self.kind])
        full = f"llvm.vector.reduce.{name}.v{self.size}f32"
        function = cgutils.get_or_insert_function(self.builder.module, kind, full)
        return self.builder.call(function, (a,), fastmath=_FAST)

    def whole(self, a: Any, low: Any, high: Any) -> Any:
        """The nearest whole numbers in low .. high."""
        return self.call("rint", self.call("minnum", self.call("maxnum", a, self.splat(low)), self.splat(high)))

    def uneven(self, y: Any, table: tuple[int, ...], index: bool) -> Any:
        """The nearest levels of a table, or their codes."""
        out = self.constant(0 if index else table[0])
        for below, level in pairwise(table):
            above = self.builder.fcmp_ordered(">", y, self.constant((below + level) / 2))
            step = self.constant(1 if index else level - below)
            out = self.add(out, self.builder.select(above, step, self.constant(0)))
        return out


def _given(kind: Any) -> bool:
    return not isinstance(kind, types.NoneType)


def _tuple(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
    return context.make_tuple(builder, signature.return_type, list(values))


@intrinsic
def sums(
    _typing: Any, x: Any, w: Any, ks: Any, inv: Any, shift: Any, low: Any, top: Any, minimum: Any, uneven: Any
) -> Any:
    """Sums of w r^2, w r, w r q, w q, w q^2, where y = x * inv + shift = q + r and q is the nearest level.

    low, top: the end levels (unless uneven). Without a minimum w r, w q and the shift are left out.
    """
    one, both = types.float32, _given(minimum)
    signature = types.UniTuple(one, 5)(x, w, ks, one, one, one, one, minimum, uneven)

    def generate(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        v = _Vectors(context, builder, ks.count)
        weight = v.load(x, a[0])
        importance = v.load(w, a[1])
        y = v.multiply(weight, v.splat(a[3]))
        if both:
            y = v.add(y, v.splat(a[4]))
        q = v.uneven(y, _TABLES[uneven.count], False) if _given(uneven) else v.whole(y, a[5], a[6])
        r = v.subtract(y, q)
        wr, wq = v.multiply(importance, r), v.multiply(importance, q)
        zero = ir.Constant(_FLOAT, 0.0)
        plain = (v.total(wr), v.total(wq)) if both else (zero, zero)
        parts = (v.total(v.multiply(wr, r)), plain[0], v.total(v.multiply(wr, q)), plain[1], v.total(v.multiply(wq, q)))
        return _tuple(context, builder, signature, parts)

    return signature, generate


@intrinsic
def flat_sums(_typing: Any, x: Any, w: Any, ks: Any, m: Any) -> Any:
    """Sums of w r^2 and w r for r = x + m."""
    signature = types.UniTuple(types.float32, 2)(x, w, ks, types.float32)

    def generate(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        v = _Vectors(context, builder, ks.count)
        r = v.add(v.load(x, a[0]), v.splat(a[3]))
        wr = v.multiply(v.load(w, a[1]), r)
        return _tuple(context, builder, signature, (v.total(v.multiply(wr, r)), v.total(wr)))

    return signature, generate


@intrinsic
def span(_typing: Any, x: Any, w: Any, ks: Any) -> Any:
    """The least and the largest of x, and the sum of w."""
    signature = types.UniTuple(types.float32, 3)(x, w, ks)

    def generate(context: Any, builder: Any, signature: Any, a: Any) -> Any:
        v = _Vectors(context, builder, ks.count)
        values = v.load(x, a[0])
        parts = (v.extreme(values, "fmin"), v.extreme(values, "fmax"), v.total(v.load(w, a[1])))
        return _tuple(context, builder, signature, parts)

    return signature, generate


@intrinsic
def misfit(_typing: Any, values: Any, curvature: Any, ss: Any, d: Any, inv: Any, low: Any, high: Any) -> Any:
    """sum curvature * (v - d * t)^2 for the whole numbers t in low .. high nearest to v * inv."""
    one = types.float32
    signature = one(values, curvature, ss, one, one, one, one)

    def generate(context: Any, builder: Any, _signature: Any, a: Any) -> Any:
        v = _Vectors(context, builder, ss.count)
        value = v.load(values, a[0])
        t = v.whole(v.multiply(value, v.splat(a[4])), a[5], a[6])
        r = v.subtract(value, v.multiply(v.splat(a[3]), t))
        return v.total(v.multiply(v.load(curvature, a[1]), v.multiply(r, r)))

    return signature, generate


@intrinsic
def write_codes(
    _typing: Any, x: Any, codes: Any, ks: Any, inv: Any, shift: Any, low: Any, top: Any, first: Any, uneven: Any
) -> Any:
    """codes[:K] = the level nearest to x * inv + shift, less the level `first` (uneven: its index)."""
    one = types.float32
    signature = types.void(x, codes, ks, one, one, one, one, one, uneven)

    def generate(context: Any, builder: Any, _signature: Any, a: Any) -> Any:
        v = _Vectors(context, builder, ks.count)
        y = v.add(v.multiply(v.load(x, a[0]), v.splat(a[3])), v.splat(a[4]))
        q = (
            v.uneven(y, _TABLES[uneven.count], True)
            if _given(uneven)
            else v.subtract(v.whole(y, a[5], a[6]), v.splat(a[7]))
        )
        kind = ir.VectorType(_BYTE, ks.count)
        small = builder.trunc(builder.fptosi(q, ir.VectorType(_INT32, ks.count)), kind)
        builder.store(small, v.pointer(codes, a[1], kind), align=1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def half_bits(_typing: Any, value: Any) -> Any:
    """float32 -> the bits of the nearest float16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def from_half(_typing: Any, bits: Any) -> Any:
    """The bits of a float16 -> float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def scalar(name: str, count: int) -> Callable[..., Any]:
    """LLVM's float32 operation `name` of 1 or 2 numbers: numba's own min, max and round are branches and calls."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic(name, [_FLOAT], ir.FunctionType(_FLOAT, [_FLOAT] * count))
        return builder.call(function, arguments, fastmath=_FAST)

    if count == 1:

        @intrinsic
        def one(_typing: Any, a: Any) -> Any:
            return types.float32(types.float32), generate

        return one

    @intrinsic
    def two(_typing: Any, a: Any, b: Any) -> Any:
        return types.float32(types.float32, types.float32), generate

    return two
