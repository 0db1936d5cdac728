"""`search` on CUDA (Triton), exhaustive: one group per lane.

Points are walked one by one, the same for all lanes; P and Q of a point live in registers and serve all scales, so that
a scale costs one multiply-add and one minimum a point. Nothing of size [groups, entries] is ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import DELTA, Layout, Signs
from .search import Choice
from .tables import points_on

LANES, WARPS, WARPS_OF = 256, 4, {"IQ2_S": 2}  # measured on an H100 (bench/RESULTS.md)


@triton.jit
def _over_block(value, PER: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over the PER lanes of each block, in every lane."""
    total = tl.sum(tl.reshape(value, (LANES // PER, PER)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (LANES // PER, PER)), (LANES,))


@triton.jit
def _partner(value, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value of the other lane of each pair."""
    left, right = tl.split(tl.reshape(value, (LANES // 2, 2)))
    return tl.reshape(tl.join(right, left), (LANES,))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, scale_ptr, table_ptr, error_ptr, index_ptr, code_ptr, sign_ptr, minus_ptr, groups, delta,
    ENTRIES: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, PARITY: tl.constexpr, SHIFTED: tl.constexpr,
    SHARED: tl.constexpr, STEPS: tl.constexpr, CHOOSE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Error of each block of PER groups at each scale, or the best scale with its points.

    x, w [groups, GROUP], scale [groups / PER, STEPS], table [ENTRIES, GROUP]. Without CHOOSE: error, as scale.
    With: index [groups / PER], code [groups], sign bytes and minus [octets]. A group has one variant, or two: a sign
    turned (PARITY with GROUP 4: in one of two groups), delta negative (SHIFTED; SHARED: the same for the block).
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < groups
    PAIR: tl.constexpr = PARITY and GROUP == 4
    VARIANTS: tl.constexpr = 2 if PAIR or SHIFTED else 1
    a, w = (), ()
    bits, minuses = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32)
    tilt, weight = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(GROUP):
        x_i = tl.load(x_ptr + lane * GROUP + i, mask=live, other=0.0)
        w_i = tl.load(w_ptr + lane * GROUP + i, mask=live, other=0.0)
        bits += (x_i < 0).to(tl.int32) << i
        minuses += (x_i < 0).to(tl.int32)
        if SHIFTED:
            tilt += 2.0 * delta * w_i * x_i
            weight += delta * delta * w_i
        w = w + (w_i,)
        a = a + (2.0 * w_i * (x_i if SHIFTED else tl.abs(x_i)),)
    if PAIR:
        minuses += _partner(minuses, LANES)
    odd = minuses % 2 == 1
    turning = tl.where(odd, 2.0, 0.0)
    scale, best, code = (), (), ()
    for k in tl.static_range(STEPS):
        scale = scale + (tl.load(scale_ptr + (lane // PER) * STEPS + k, mask=live, other=0.0),)
    for _ in tl.static_range(STEPS * VARIANTS):
        best = best + (tl.full((LANES,), 3e38, tl.float32),)
        code = code + (tl.zeros((LANES,), tl.int32),)
    for entry in range(ENTRIES):
        p, q, linear = tl.zeros((LANES,), tl.float32), weight, tl.zeros((LANES,), tl.float32)
        least = tl.full((LANES,), 3e38, tl.float32)
        for i in tl.static_range(GROUP):
            c = tl.load(table_ptr + entry * GROUP + i)
            term = a[i] * c
            p += term
            q += w[i] * (c * c)
            if PARITY:
                least = tl.minimum(least, term)
            if SHIFTED:
                linear += w[i] * (2.0 * delta * c)
        if PARITY and GROUP == 8:
            p -= turning * least
        new_best, new_code = (), ()
        for k in tl.static_range(STEPS):
            base = scale[k] * q - p
            for v in tl.static_range(VARIANTS):
                error = base
                if SHIFTED:
                    error = base + scale[k] * linear if v == 0 else base - scale[k] * linear
                elif PAIR and v == 1:
                    error = base + 2.0 * least
                if CHOOSE:  # a select for both: a minimum has half the rate
                    better = error < best[k * VARIANTS + v]
                    new_code = new_code + (tl.where(better, entry, code[k * VARIANTS + v]),)
                    new_best = new_best + (tl.where(better, error, best[k * VARIANTS + v]),)
                else:
                    new_best = new_best + (tl.minimum(best[k * VARIANTS + v], error),)
        best = new_best
        if CHOOSE:
            code = new_code
    lowest = tl.full((LANES,), 3e38, tl.float32)
    index, chosen = tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.int32)
    flag = lane < 0
    for k in tl.static_range(STEPS):
        own, second = scale[k] * best[k * VARIANTS], odd
        if SHIFTED:
            minus = scale[k] * (best[k * VARIANTS + 1] + tilt)
            own -= scale[k] * tilt
            if SHARED:
                second = _over_block(minus, PER, LANES) < _over_block(own, PER, LANES)
            else:
                second = minus < own
            own = tl.where(second, minus, own)
        elif PAIR:
            price = scale[k] * best[k * VARIANTS + 1] - own
            other = _partner(price, LANES)
            second = odd & tl.where(lane % 2 == 1, price < other, price <= other)
            own += tl.where(second, price, 0.0)
        total = _over_block(own, PER, LANES)
        if CHOOSE:
            lower = total < lowest
            lowest = tl.where(lower, total, lowest)
            index = tl.where(lower, k, index)
            flag = (lower & second) | ((lower == 0) & flag)
            picked = code[k * VARIANTS]
            if VARIANTS == 2:
                picked = tl.where(second, code[k * VARIANTS + 1], picked)
            chosen = tl.where(lower, picked, chosen)
        else:
            tl.store(error_ptr + (lane // PER) * STEPS + k, total, mask=live & (lane % PER == 0))
    if CHOOSE:
        tl.store(index_ptr + lane // PER, index.to(tl.int64), mask=live & (lane % PER == 0))
        tl.store(code_ptr + lane, chosen.to(tl.int16), mask=live)
        if SHIFTED:
            tl.store(minus_ptr + lane, flag.to(tl.int8), mask=live)
        else:
            if PARITY:
                low, place = tl.full((LANES,), 3e38, tl.float32), tl.zeros((LANES,), tl.int32)
                for i in tl.static_range(GROUP):
                    cost = a[i] * tl.load(table_ptr + chosen * GROUP + i)
                    place = tl.where(cost < low, i, place)
                    low = tl.minimum(low, cost)
                bits = bits ^ (flag.to(tl.int32) << place)
            if GROUP == 4 and PER > 1:
                bits = bits | (_partner(bits, LANES) << 4)
                tl.store(sign_ptr + lane // 2, bits.to(tl.uint8), mask=live & (lane % 2 == 0))
            else:
                tl.store(sign_ptr + lane, bits.to(tl.uint8), mask=live)


def _search(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float, choosing: bool) -> tuple[Any, ...]:
    """Errors [B, S]; or the fields of a Choice."""
    (count, width), steps = x.shape, scales.shape[1]
    per = width // layout.group
    options: dict[str, Any] = {"device": x.device}
    error = torch.empty((0 if choosing else count, steps), **options)
    size = count if choosing else 0
    index, code = (
        torch.empty(size, dtype=torch.int64, **options),
        torch.empty(size, per, dtype=torch.int16, **options),
    )
    octets = (size, -(-width // 8))
    signs = torch.zeros(octets, dtype=torch.uint8, **options)
    minus = torch.zeros(octets, dtype=torch.bool, **options)
    table = points_on(layout.name, x.device)
    parity, shifted = layout.signs is Signs.PARITY, layout.signs is Signs.DELTA
    _kernel[(triton.cdiv(count * per, LANES),)](
        x.contiguous(), weight.contiguous(), scales.contiguous(), table, error, index, code, signs,
        minus.view(torch.int8), count * per, delta, table.shape[0], layout.group, per, parity, shifted,
        layout.name == "IQ1_S", steps, choosing, LANES, num_warps=WARPS_OF.get(layout.name, WARPS),
    )  # fmt: skip
    return (index, code, signs, minus) if choosing else (error,)


def scan(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """`search.scan` on CUDA."""
    return _search(x, weight, scales, layout, DELTA, False)[0]


def choose(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float = DELTA) -> Choice:
    """`search.choose` on CUDA."""
    return Choice(*_search(x, weight, scales, layout, delta, True))
