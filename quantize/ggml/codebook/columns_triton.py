"""`columns` on CUDA (Triton), fused: `sweep_tile` and `descend_tile` of TILE columns.

One row a lane, one unit after another. Points are walked one by one, the same for all lanes: as all rows of a matrix
share the metric, sum(w c^2) of a point is one number for all of them and is formed beforehand. Same arithmetic as in
torch; sums run in another order, so ties may be rounded otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import CodebookBlock, unit_of
from .layout import DELTA, SUPER, Layout, Signs
from .tables import points_on

LANES, WARPS = 128, 2  # two rows a thread share the loads of a point
REGISTERS = 160  # of a thread at most: unbound, loads are hoisted into up to 255 of them, and fewer rows are resident
FREE, PARITY, EACH, SHARED = (tl.constexpr(i) for i in range(4))  # rules of signs; delta of 8 columns, or of 32
SHIFT = tl.constexpr(DELTA)


@triton.jit
def _walk(
    a, odd, table, squares, RULE: tl.constexpr, GROUP: tl.constexpr, POINTS: tl.constexpr, ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Least sum(w c^2) - sum(a c) and its point, of each of POINTS groups in each of its variants.

    A group has one variant, or two: a sign turned (PARITY with two points to an octet; with one it is turned where
    `odd`), delta positive and negative (EACH). squares [POINTS, ENTRIES], EACH: [variants, ENTRIES]
    """
    PAIR: tl.constexpr = RULE == PARITY and POINTS == 2
    VARIANTS: tl.constexpr = 2 if PAIR or RULE == EACH else 1
    turning = tl.where(odd, 2.0, 0.0)
    best, code = (), ()
    for _ in tl.static_range(POINTS * VARIANTS):
        best = best + (tl.full((LANES,), 3e38, tl.float32),)
        code = code + (tl.zeros((LANES,), tl.int32),)
    for entry in range(ENTRIES):
        c = ()
        for i in tl.static_range(GROUP):
            c = c + (tl.load(table + entry * GROUP + i),)
        new_best, new_code = (), ()
        for g in tl.static_range(POINTS):
            p = a[g * GROUP] * c[0]
            least = p
            for i in tl.static_range(1, GROUP):
                term = a[g * GROUP + i] * c[i]
                p += term
                if RULE == PARITY:
                    least = tl.minimum(least, term)
            if RULE == PARITY and POINTS == 1:
                p -= turning * least
            for v in tl.static_range(VARIANTS):
                error = tl.load(squares + (v if RULE == EACH else g) * ENTRIES + entry) - p
                if PAIR and v == 1:
                    error += 2.0 * least
                better = error < best[g * VARIANTS + v]
                new_best = new_best + (tl.where(better, error, best[g * VARIANTS + v]),)
                new_code = new_code + (tl.where(better, entry, code[g * VARIANTS + v]),)
        best = new_best
        code = new_code
    return best, code


@triton.jit
def _variants(best, code, odd, tilt, RULE: tl.constexpr, POINTS: tl.constexpr):
    """Which variant each group takes: codes, and whether a sign is turned or delta is negative."""
    if RULE == PARITY and POINTS == 2:  # one turned sign for both points, where it costs less
        later = best[3] - best[2] < best[1] - best[0]
        first, second = odd & (later == 0), odd & later
        return (tl.where(first, code[1], code[0]), tl.where(second, code[3], code[2])), (first, second)
    elif RULE == EACH:
        minus = best[1] + tilt < best[0] - tilt
        return (tl.where(minus, code[1], code[0]),), (minus,)
    else:
        return code, (odd,)


@triton.jit
def _nearest(
    x, minus, weight, squares, table,
    RULE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, ENTRIES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Nearest points to a unit x, in units of the codebook: values, codes, sign bits, whether delta is negative.

    x: tuple of UNIT; minus: SHARED's delta is negative
    """
    POINTS: tl.constexpr = UNIT // GROUP
    a = ()
    bits, tilt = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.float32)
    shift = tl.where(minus, -SHIFT, SHIFT)
    for i in tl.static_range(UNIT):
        w = 2.0 * tl.load(weight + i)
        if RULE == SHARED:
            a = a + (w * (x[i] - shift),)
        elif RULE == EACH:
            a = a + (w * x[i],)
            tilt += w * x[i] * SHIFT
        else:
            a = a + (w * tl.abs(x[i]),)
            bits |= (x[i] < 0).to(tl.int32) << i
    folded = bits ^ (bits >> 4)
    folded = folded ^ (folded >> 2)
    odd = ((folded ^ (folded >> 1)) & 1) == 1
    best, code = _walk(a, odd, table, squares, RULE, GROUP, POINTS, ENTRIES, LANES)
    code, second = _variants(best, code, odd, tilt, RULE, POINTS)
    if RULE == EACH:
        minus = second[0]
        shift = tl.where(minus, -SHIFT, SHIFT)
    found = ()
    for g in tl.static_range(POINTS):
        low, place = tl.full((LANES,), 3e38, tl.float32), tl.zeros((LANES,), tl.int32)
        for i in tl.static_range(GROUP):
            c = tl.load(table + code[g] * GROUP + i)
            cost = a[g * GROUP + i] * c
            place = tl.where(cost < low, g * GROUP + i, place)
            low = tl.minimum(low, cost)
            found = found + (c,)
        if RULE == PARITY:
            bits = bits ^ (second[g].to(tl.int32) << place)
    values = ()
    for i in tl.static_range(UNIT):
        if RULE == EACH or RULE == SHARED:
            values = values + (found[i] + shift,)
        else:
            values = values + (tl.where(((bits >> i) & 1) == 1, -found[i], found[i]),)
    return values, code, bits, minus


@triton.jit
def _wanted(before, pull, inverse, UNIT: tl.constexpr):
    """Where a unit would go without a codebook: before + pull @ inverse; tuples of UNIT."""
    wanted = ()
    for j in tl.static_range(UNIT):
        value = before[j]
        for i in tl.static_range(UNIT):
            value += pull[i] * tl.load(inverse + i * UNIT + j)
        wanted = wanted + (value,)
    return wanted


@triton.jit
def _loss(change, pull, own, stride, UNIT: tl.constexpr):
    """change M change - 2 pull change: what a change does to the objective."""
    total = tl.zeros_like(change[0])
    for j in tl.static_range(UNIT):
        bent = -2.0 * pull[j]
        for i in tl.static_range(UNIT):
            bent += change[i] * tl.load(own + i * stride + j)
        total += change[j] * bent
    return total


@triton.jit
def _with_later(values, matrix, first, rows, stride, live, SIGN: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr):
    """The unit at `first`, with SIGN * (what stands in the columns behind it) @ matrix added: tuple of UNIT."""
    own = ()
    for i in tl.static_range(UNIT):
        own = own + (tl.load(values + (first + i) * rows, mask=live, other=0.0),)
    for k in range(first + UNIT, TILE):
        change = tl.load(values + k * rows, mask=live, other=0.0)
        added = ()
        for i in tl.static_range(UNIT):
            added = added + (own[i] + SIGN * change * tl.load(matrix + k * stride + first + i),)
        own = added
    return own


@triton.jit
def _kernel(
    values, source, decoded, scale, weight, squares, table, code, signs, minus, matrix, inverse,
    rows, column, values_expert, decoded_expert, matrix_expert, matrix_row, inverse_expert,
    DESCEND: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr, PER: tl.constexpr,
    ENTRIES: tl.constexpr, SIDES: tl.constexpr, SUPER: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One tile, TILE columns from `column` on, of LANES rows of a matrix; PER columns share a scale.

    A unit reads its own columns of `values` with those behind it, and leaves its error (or its change) in their place.
    """
    expert = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < rows
    row = expert * rows + lane
    values += expert * values_expert + lane
    decoded += expert * decoded_expert + lane
    source += expert * decoded_expert + lane
    scale += row * (SUPER // PER) + column // PER
    code += row * (SUPER // GROUP) + column // GROUP
    signs += row * (SUPER // 8) + column // 8
    minus += row * (SUPER // 8) + column // 8
    weight += expert * SUPER + column
    squares += expert * (TILE // GROUP * SIDES * ENTRIES)
    matrix += expert * matrix_expert
    inverse += expert * inverse_expert
    for back in range(TILE // UNIT):
        first = TILE - UNIT - back * UNIT
        step = tl.load(scale + first // PER, mask=live, other=0.0)
        inverted = tl.where(step == 0.0, 0.0, 1.0 / tl.where(step == 0.0, 1.0, step))
        goal = _with_later(values, matrix, first, rows, matrix_row, live, -1 if DESCEND else 1, UNIT, TILE)
        pull, before, wanted = goal, (), ()
        for i in tl.static_range(UNIT):
            place = (decoded if DESCEND else source) + (first + i) * rows
            before = before + (tl.load(place, mask=live, other=0.0),)
        if DESCEND:
            goal = _wanted(before, pull, inverse + first * UNIT, UNIT)
        for i in tl.static_range(UNIT):
            wanted = wanted + (goal[i] * inverted,)
        flag = lane < 0
        if RULE == SHARED:
            flag = tl.load(minus + first // 8, mask=live, other=0) != 0
        found, codes, bits, flag = _nearest(
            wanted, flag, weight + first, squares + first // GROUP * SIDES * ENTRIES, table,
            RULE, GROUP, UNIT, ENTRIES, LANES,
        )  # fmt: skip
        change, keep = (), live
        for i in tl.static_range(UNIT):  # of what is written; or the error, source - decoded
            change = change + (step * found[i] - before[i] if DESCEND else before[i] - step * found[i],)
        if DESCEND:
            keep = live & (_loss(change, pull, matrix + first * matrix_row + first, matrix_row, UNIT) < 0)
        for i in tl.static_range(UNIT):
            tl.store(decoded + (first + i) * rows, step * found[i], mask=keep)
            tl.store(values + (first + i) * rows, tl.where(keep, change[i], 0.0), mask=live)
        for g in tl.static_range(UNIT // GROUP):
            tl.store(code + first // GROUP + g, codes[g].to(tl.int16), mask=keep)
        if RULE == EACH:
            tl.store(minus + first // 8, flag.to(tl.int8), mask=keep)
        elif RULE != SHARED:
            if UNIT == 4:  # half of an octet
                shift = first % 8
                old = tl.load(signs + first // 8, mask=live, other=0).to(tl.int32)
                bits = (old & (240 >> shift)) | (bits << shift)
            tl.store(signs + first // 8, bits.to(tl.uint8), mask=keep)
        tl.debug_barrier()  # what one unit leaves in memory, the next one reads


def sweep_tile(
    block: CodebookBlock, inner: slice, target: Tensor, source: Tensor, decoded: Tensor, lower: Tensor
) -> None:
    """As `iquant_columns.sweep_tile`."""
    _launch(block, inner, target, source, decoded, lower[:, inner, inner], None)


def descend_tile(
    block: CodebookBlock, inner: slice, pull: Tensor, decoded: Tensor, moments: Tensor, inverse: Tensor
) -> None:
    """As `iquant_columns.descend_tile`."""
    unit = unit_of(block.layout)
    own = inverse[:, inner.start // unit : inner.stop // unit]
    _launch(block, inner, pull, decoded, decoded, moments[:, inner, inner], own)


def _launch(
    block: CodebookBlock,
    inner: slice,
    values: Tensor,
    source: Tensor,
    decoded: Tensor,
    matrix: Tensor,
    inverse: Tensor | None,
) -> None:
    experts, _, rows = values.shape
    layout, fields = block.layout, block.fields
    table, squared = points_on(layout.name, values.device), _squared(layout, values.device)
    sums = block.weight[:, inner].reshape(experts, -1, layout.group) @ squared
    parts = [tensor[:, inner] for tensor in (values, source, decoded)]
    assert all(part.stride()[1:] == (rows, 1) for part in parts)
    assert source.stride() == decoded.stride()
    assert matrix.stride(2) == 1, matrix.stride()
    assert all(t.is_contiguous() for t in (block.scale, block.weight, fields.code, fields.signs, fields.minus))
    own = matrix if inverse is None else inverse
    assert inverse is None or inverse[0].is_contiguous(), inverse.stride()
    _kernel[(triton.cdiv(rows, LANES), experts)](
        *parts, block.scale, block.weight, sums, table, fields.code, fields.signs, fields.minus.view(torch.int8),
        matrix, own, rows, inner.start, values.stride(0), decoded.stride(0), matrix.stride(0), matrix.stride(1),
        own.stride(0), inverse is not None, _rule(layout), layout.group, unit_of(layout), layout.shared,
        table.shape[0], squared.shape[1] // table.shape[0], SUPER, inner.stop - inner.start, LANES,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


def _rule(layout: Layout) -> int:
    if layout.signs is Signs.DELTA:
        return (SHARED if layout.name == "IQ1_S" else EACH).value
    return (FREE if layout.signs is Signs.FREE else PARITY).value


@lru_cache
def _squared(layout: Layout, device: torch.device) -> Tensor:
    """c^2 of all points, [group, entries]; for a delta of each octet (c + delta)^2, then (c - delta)^2."""
    table = points_on(layout.name, device)
    parts = [table + DELTA, table - DELTA] if layout.name == "IQ1_M" else [table]
    return torch.cat(parts).square().T.contiguous()
