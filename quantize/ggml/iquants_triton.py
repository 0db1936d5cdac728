"""Exhaustive search of the I-quants' codebooks on CUDA (Triton): the arithmetic of `iquants_numba`, one group a lane.

Points are walked one by one, the same for all lanes; P and Q of a point live in registers and serve all scales, so that a scale
costs one multiply-add and one minimum a point. Nothing of size [groups, entries] is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grids import points_on
from .iquants_layout import DELTA, Layout, Signs
from .iquants_search import Choice, combined, picked

LANES, WARPS = 256, 4


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, scale_ptr, table_ptr, error_ptr, code_ptr, groups, per_block, delta,
    ENTRIES: tl.constexpr, GROUP: tl.constexpr, PARITY: tl.constexpr, SHIFTED: tl.constexpr, STEPS: tl.constexpr, CODES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Least error (and its point) of each group at each scale.

    x, w [groups, GROUP], scale [groups / per_block, STEPS], table [entries, GROUP]; error, code [groups, variants, STEPS]:
    one variant, or two: sign turned (PARITY, GROUP 4), delta negative (SHIFTED). PARITY with GROUP 8: turned where x needs it.
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = lane < groups
    PAIR: tl.constexpr = SHIFTED or (PARITY and GROUP == 4)
    VARIANTS: tl.constexpr = 2 if PAIR else 1
    a, w = (), ()
    minuses = tl.zeros((LANES,), tl.int32)
    tilt, weight = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for i in tl.static_range(GROUP):
        x_i = tl.load(x_ptr + lane * GROUP + i, mask=live, other=0.0)
        w_i = tl.load(w_ptr + lane * GROUP + i, mask=live, other=0.0)
        minuses += (x_i < 0).to(tl.int32)
        if SHIFTED:
            tilt += 2.0 * delta * w_i * x_i
            weight += delta * delta * w_i
        w = w + (w_i,)
        a = a + (2.0 * w_i * (x_i if SHIFTED else tl.abs(x_i)),)
    turning = tl.where(minuses % 2 == 1, 2.0, 0.0)
    scale, best, code = (), (), ()
    for k in tl.static_range(STEPS):
        scale = scale + (tl.load(scale_ptr + (lane // per_block) * STEPS + k, mask=live, other=0.0),)
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
                if CODES:
                    new_code = new_code + (tl.where(error < best[k * VARIANTS + v], entry, code[k * VARIANTS + v]),)
                new_best = new_best + (tl.minimum(best[k * VARIANTS + v], error),)
        best = new_best
        if CODES:
            code = new_code
    for k in tl.static_range(STEPS):
        for v in tl.static_range(VARIANTS):
            error = best[k * VARIANTS + v]
            if SHIFTED:
                error = error - tilt if v == 0 else error + tilt
            at = (lane * VARIANTS + v) * STEPS + k
            tl.store(error_ptr + at, scale[k] * error, mask=live)
            if CODES:
                tl.store(code_ptr + at, code[k * VARIANTS + v].to(tl.int16), mask=live)


def _least(
    x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float, codes: bool
) -> tuple[Tensor, Tensor]:
    """Error float32 and code int16 [B, groups, variants, S]; without `codes` the second is empty."""
    per_block, steps = x.shape[1] // layout.group, scales.shape[1]
    parity, shifted = layout.signs is Signs.PARITY, layout.signs is Signs.DELTA
    variants = 2 if shifted or (parity and layout.group == 4) else 1
    shape = (x.shape[0], per_block, variants, steps)
    error = torch.empty(shape, device=x.device)
    code = torch.empty(shape if codes else 0, dtype=torch.int16, device=x.device)
    table, groups = points_on(layout.name, x.device), x.shape[0] * per_block
    _kernel[(triton.cdiv(groups, LANES),)](
        x.contiguous(), weight.contiguous(), scales.contiguous(), table, error, code, groups, per_block, delta,
        table.shape[0], layout.group, parity, shifted, steps, codes, LANES, num_warps=WARPS,
    )  # fmt: skip
    return error, code


def scan(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """`iquants_search.scan` on CUDA."""
    return combined(_least(x, weight, scales, layout, DELTA, False)[0], x, layout)[0]


def choose(x: Tensor, weight: Tensor, scales: Tensor, layout: Layout, delta: float = DELTA) -> Choice:
    """`iquants_search.choose` on CUDA."""
    return picked(*_least(x, weight, scales, layout, delta, True), x, weight, layout)
