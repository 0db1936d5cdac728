"""Add rows of all matrices to a pair's sums in a few launches on CUDA, as products of bfloat16 rows.

`Pair.add` is the plain way. Here weighted rows are rounded to bfloat16 once more, and the cross moments are collected
as sums of (x - z) z^T: what both streams share is in no rounding of their difference, which is all that the correction
uses. `complete` makes the sums what `Pair` says they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..statistics.sums import scaled_rows

if TYPE_CHECKING:
    from .moments import Lacking, Pair


def add_sorted(
    pair: Pair,
    x: Tensor,
    z: Tensor,
    offsets: list[int],
    share: Tensor | None,
    scale: Tensor | None,
    lacking: Lacking | None,
) -> None:
    """Rows x, z [R, n] sorted by matrix, matrix e owning offsets[e]:offsets[e+1], each counted by share^2 [R].

    scale [E]: powers of two that x is multiplied by; lacking: what the residual stream lacks at these rows.
    """
    from ..statistics.reduce_triton import add_grams, add_products, segment_sums

    ends = torch.tensor(offsets, dtype=torch.int32, device=x.device)
    weight = torch.ones(len(x), device=x.device) if share is None else share.float().clone()
    if scale is not None:
        x = x * scale.repeat_interleave(ends.diff(), output_size=len(x)).unsqueeze(1).to(x.dtype)
    if pair.held is not None:
        out, places = pair.held.choose(offsets)
        by = weight[out].unsqueeze(1)
        lost = None if lacking is None else lacking.rows(out) * by
        pair.held.fill(places, x[out].float() * by, z[out].float() * by, lost)
        weight[out] = 0.0
    written = scaled_rows(z, weight)
    add_grams(pair.own, written, ends)
    add_products(pair.cross, (x - z).mul_(weight.unsqueeze(1)), written, ends)
    if pair.drift is not None and lacking is not None:
        hidden = lacking.hidden.to(x.dtype)
        add_products(pair.drift, hidden, scaled_rows(written, weight), ends, lacking.token)
    pair.weight.add_(segment_sums(weight, ends)[1])
    pair.rows.add_(segment_sums((weight != 0).float(), ends)[0])


def complete(pair: Pair) -> None:
    """Own moments above their diagonal, and cross moments from their distance to them; in place, once."""
    from ..statistics.reduce_triton import mirror

    mirror(pair.own)
    pair.cross.add_(pair.own)
