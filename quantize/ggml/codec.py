"""Encode and decode rows of weights as ggml tensor types, in llama.cpp's layout bit for bit.

    encode(rows [R, n] float32, kind, importance [n], [G, n] or None) -> uint8 [R, bytes of a row]
    decode(data [R, bytes of a row] uint8, kind, columns) -> float32 [R, n]

Both run on the device of their input. `encode` minimises sum importance * (x - q)^2 (plain squares without importance).

For error feedback the types with a reconstruction grid (grid.FORMS: all but the I-quants of 1 to 3 bits) come apart:

    grid = search(rows, kind, importance)        frozen scales as they will be stored (see grid.Grid):
                                                 grid.step [R, n/sub], grid.minimum [R, n/sub] or None, grid.levels [L],
                                                 grid.form.sub, grid.form.uniform
    codes = nearest(grid, first, values [R, c])  uint8 [R, c] for the columns first .. first + c
    values(grid, codes, first)                   float32 [R, c]: step * levels[code] - minimum, what decode will give
    pack(grid, codes [R, n]) -> uint8 [R, bytes of a row]
    unpack(data, kind, columns) -> (grid, codes)

encode = pack(grid, nearest(grid, 0, rows)). To compensate errors super-block by super-block, search one super-block's
columns at a time on the compensated weights; `concatenate(grids)` joins the super-blocks' grids along the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmquant.errors import InputError

from ..overflow import FP16_MAX
from .scalar import iq4, kquants, legacy
from .scalar.bits import Blocks
from .scalar.effort import EFFORTS
from .scalar.grid import FORMS, Grid, nearest, values
from .scalar.search import search_rows
from .types import GGMLType

__all__ = ["concatenate", "decode", "encode", "nearest", "pack", "search", "unpack", "values"]

_PACK: dict[GGMLType, Callable[[Blocks], Tensor]] = {
    GGMLType.Q4_0: legacy.pack_q4_0,
    GGMLType.Q4_1: legacy.pack_q4_1,
    GGMLType.Q5_0: legacy.pack_q5_0,
    GGMLType.Q5_1: legacy.pack_q5_1,
    GGMLType.Q8_0: legacy.pack_q8_0,
    GGMLType.Q2_K: kquants.pack_q2_k,
    GGMLType.Q3_K: kquants.pack_q3_k,
    GGMLType.Q4_K: kquants.pack_q4_k,
    GGMLType.Q5_K: kquants.pack_q5_k,
    GGMLType.Q6_K: kquants.pack_q6_k,
    GGMLType.IQ4_NL: iq4.pack_iq4_nl,
    GGMLType.IQ4_XS: iq4.pack_iq4_xs,
    GGMLType.MXFP4: iq4.pack_mxfp4,
}
_UNPACK: dict[GGMLType, Callable[[Tensor], Blocks]] = {
    GGMLType.Q4_0: legacy.unpack_q4_0,
    GGMLType.Q4_1: legacy.unpack_q4_1,
    GGMLType.Q5_0: legacy.unpack_q5_0,
    GGMLType.Q5_1: legacy.unpack_q5_1,
    GGMLType.Q8_0: legacy.unpack_q8_0,
    GGMLType.Q2_K: kquants.unpack_q2_k,
    GGMLType.Q3_K: kquants.unpack_q3_k,
    GGMLType.Q4_K: kquants.unpack_q4_k,
    GGMLType.Q5_K: kquants.unpack_q5_k,
    GGMLType.Q6_K: kquants.unpack_q6_k,
    GGMLType.IQ4_NL: iq4.unpack_iq4_nl,
    GGMLType.IQ4_XS: iq4.unpack_iq4_xs,
    GGMLType.MXFP4: iq4.unpack_mxfp4,
}
_PLAIN = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def encode(rows: Tensor, kind: GGMLType, importance: Tensor | None = None, effort: str = "default") -> Tensor:
    """`rows` [R, n] float32 as `kind`: uint8 [R, bytes of a row] on the same device.

    importance  [n], or [G, n] for G groups of R/G rows each; not negative. The error that is minimised is
                sum importance * (x - q)^2
    effort      "fast", "default" or "high": how widely scales are searched

    Raises ValueError for a ragged row, for NaN or infinity, for values that the type's float16 scale cannot reach and
    for an importance of the wrong shape, negative or not finite.
    """
    check_rows(rows, kind)
    if kind in _PLAIN:
        return rows.to(_PLAIN[kind]).contiguous().view(torch.uint8).view(len(rows), -1)
    if kind in FORMS:
        return pack(*search_rows(rows, kind, _check_importance(importance, rows, kind), EFFORTS[effort]))
    from .codebook import encode as iquants

    weight = _check_importance(importance, rows, kind)
    if weight is not None:
        weight = weight.repeat_interleave(len(rows) // len(weight), 0)
    return iquants.encode_codebook(rows, kind, weight, iquants.EFFORTS[effort])


def decode(data: Tensor, kind: GGMLType, columns: int) -> Tensor:
    """float32 [R, columns] of `data` [R, bytes of a row] uint8; the values of ggml. ValueError for other sizes."""
    _check_data(data, kind, columns)
    if kind in _PLAIN:
        return data.contiguous().view(_PLAIN[kind]).float().view(len(data), columns)
    if kind in FORMS:
        return values(*unpack(data, kind, columns))
    from .codebook import encode as iquants

    return iquants.decode_codebook(data, kind, columns)


def search(rows: Tensor, kind: GGMLType, importance: Tensor | None = None, effort: str = "default") -> Grid:
    """The scales of `rows` [R, n] float32 as they will be stored. ValueError as for `encode`."""
    check_rows(rows, kind)
    return search_rows(rows, kind, _check_importance(importance, rows, kind), EFFORTS[effort])[0]


def pack(grid: Grid, codes: Tensor) -> Tensor:
    """The bytes [R, bytes of a row] uint8 of codes [R, n] uint8 in their grid."""
    subs = grid.kind.block_columns // grid.form.sub
    steps, minimums = (None if part is None else part.reshape(-1, subs) for part in (grid.steps, grid.minimums))
    dmin = None if grid.dmin is None else grid.dmin.reshape(-1)
    blocks = Blocks(codes.reshape(-1, grid.kind.block_columns), grid.d.reshape(-1), dmin, steps, minimums)
    return _PACK[grid.kind](blocks).view(len(grid.d), grid.kind.row_bytes(grid.columns))


def unpack(data: Tensor, kind: GGMLType, columns: int) -> tuple[Grid, Tensor]:
    """The grid and the codes uint8 [R, columns] of `data` [R, bytes of a row] uint8."""
    _check_data(data, kind, columns)
    blocks = _UNPACK[kind](data.reshape(-1, kind.block_bytes))
    rows = len(data)
    parts = (blocks.d, blocks.dmin, blocks.steps, blocks.minimums)
    return Grid(kind, *(None if p is None else p.reshape(rows, -1) for p in parts)), blocks.codes.view(rows, columns)  # type: ignore[arg-type]


def concatenate(grids: Sequence[Grid]) -> Grid:
    """One grid of the grids of neighbouring columns."""

    def join(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None], 1)

    d = torch.cat([g.d for g in grids], 1)
    return Grid(grids[0].kind, d, *(join([getattr(g, n) for g in grids]) for n in ("dmin", "steps", "minimums")))


def check_rows(rows: Tensor, kind: GGMLType) -> None:
    """InputError for rows [R, n] that `encode` refuses."""
    if rows.dim() != 2 or rows.dtype != torch.float32:
        raise InputError(f"{kind.name}: {rows.dtype} of shape {tuple(rows.shape)}, expected float32 rows [R, n]")
    kind.row_bytes(rows.shape[1])
    if rows.numel() == 0:
        raise InputError(f"{kind.name}: rows of shape {tuple(rows.shape)}, expected at least one weight")
    low, high = (float(v) for v in torch.aminmax(rows))
    if not (low > -float("inf") and high < float("inf")):
        raise InputError(f"{kind.name}: the weights hold NaN or infinity, expected finite values")
    limit = largest(kind)
    if max(-low, high) > limit:
        raise InputError(f"{kind.name}: a weight of magnitude {max(-low, high):.4g}, expected at most {limit:.4g}")


def largest(kind: GGMLType) -> float:
    """The magnitude up to which every weight can be stored; beyond it a float16 scale would overflow."""
    if kind is GGMLType.F16:
        return FP16_MAX
    form = FORMS.get(kind)
    if form is None or kind is GGMLType.MXFP4:
        return float("inf")
    if form.minimums is not None:
        return FP16_MAX * max(form.minimums, 1)
    return FP16_MAX * -form.lowest * (1 if form.steps is None else -form.steps[0])


def _check_importance(importance: Tensor | None, rows: Tensor, kind: GGMLType) -> Tensor | None:
    if importance is None:
        return None
    table = importance if importance.dim() == 2 else importance.unsqueeze(0)
    groups = len(table) if table.dim() == 2 else 0
    if table.shape[-1] != rows.shape[1] or groups == 0 or len(rows) % groups:
        found, expected = (
            tuple(importance.shape),
            f"[{rows.shape[1]}] or [G, {rows.shape[1]}], G a divisor of {len(rows)}",
        )
        raise InputError(f"{kind.name}: importance of shape {found}, expected {expected}")
    low, high = (float(v) for v in torch.aminmax(table))
    if not (low >= 0 and high < float("inf")):
        raise InputError(f"{kind.name}: an importance of {low if not low >= 0 else high}, expected finite values >= 0")
    return table.to(rows.device, torch.float32)


def _check_data(data: Tensor, kind: GGMLType, columns: int) -> None:
    expected = kind.row_bytes(columns)
    if data.dim() != 2 or data.dtype != torch.uint8 or data.shape[1] != expected:
        found = f"{data.dtype} of shape {tuple(data.shape)}"
        raise InputError(f"{kind.name}: {found}, expected uint8 rows of {expected} bytes for {columns} columns")
