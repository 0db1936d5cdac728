"""Factor mean second moments with super-blocks of columns in the order in which they are rounded.

One factor serves both: what corrects a weight for earlier errors, and what feeds its own errors back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear_algebra import damped_cholesky, divide, full_float32, permute_both

SUPER = 256  # columns that are searched together, where they divide the row
MINI = 32  # else
DAMPING = 0.05


@dataclass(frozen=True)
class Factor:
    """Of E matrices of mean second moments, super-blocks of columns in processing order (the last goes first).

    order [E, n / super] int64; lower [E, n, n]: C with C C^T = H; moments [E, n, n]: H, damped; both float32
    good [E] bool: no more than the damping asked for was needed
    """

    order: Tensor
    lower: Tensor
    moments: Tensor
    good: Tensor

    @property
    def columns(self) -> Tensor:
        """[E, n]: the column at each place."""
        return columns_of(self.order, self.moments.shape[-1])

    def divide(self, rows: Tensor) -> Tensor:
        """rows H^-1 for rows [E, R, n], columns in their own order on both sides."""
        index = self.columns.unsqueeze(1).expand_as(rows)
        return torch.empty_like(rows).scatter_(2, index, divide(rows.gather(2, index), self.lower))


def columns_of(order: Tensor, columns: int) -> Tensor:
    """[E, n]: the column at each place, of super-blocks in this order [E, places]."""
    size = columns // order.shape[-1]
    return (order.unsqueeze(-1) * size + torch.arange(size, device=order.device)).flatten(1)


def super_columns(columns: int) -> int:
    """Columns that are searched together in rows of `columns`; all, where they are not searched but corrected alone."""
    return next((size for size in (SUPER, MINI) if columns % size == 0), columns)


def factor_moments(second: Tensor, damping: float = DAMPING) -> Factor:
    """Factor mean second moments [E, n, n]; `damping` is the share of the mean diagonal that is added to it.

    A matrix that has no factor even at 100 times the damping (no energy, or not finite) gets the identity: its weights
    are rounded to nearest.
    """
    energy = second.diagonal(dim1=-2, dim2=-1).nan_to_num(0.0, 0.0, 0.0)
    n, mean = second.shape[-1], energy.mean(-1)
    order = torch.unflatten(energy, -1, (-1, super_columns(n))).mean(-1).argsort(dim=-1, stable=True)
    moments = permute_both(second, columns_of(order, n))
    with full_float32():
        lower, added = damped_cholesky(moments, mean, damping)
    moments.diagonal(dim1=-2, dim2=-1).add_((added * damping * mean).unsqueeze(1))
    if bool((added == 0).any()):
        moments[added == 0] = torch.eye(n, device=second.device)
    return Factor(order, lower, moments, added == 1)
