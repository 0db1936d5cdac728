"""Batched Cholesky factorization in float32, fast for hundreds of large matrices."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

BLOCK = 128
ESCALATIONS = (1.0, 10.0, 100.0)  # a failed factorization is tried again with this many times the damping
# torch.linalg carries no types.
cholesky_ex = cast("Callable[[Tensor], tuple[Tensor, Tensor]]", torch.linalg.cholesky_ex)
inv = cast("Callable[[Tensor], Tensor]", torch.linalg.inv)
solve = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.solve)


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """X of lower @ X = right for lower triangles [..., n, n] and right [..., n, k]."""
    return cast("Tensor", torch.linalg.solve_triangular(lower, right, upper=False))


@contextmanager
def full_float32(whole: bool = True) -> Generator[None]:
    """Matrix products in whole float32 (no TF32), whatever the caller has set.

    With `whole` False the other way: on CUDA factors are rounded to 11 bits (TF32), which leaves bfloat16 values whole.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not whole
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors [E, n, n] of symmetric matrices, and which of them were positive definite [E] bool.

    The input is overwritten on CUDA. The factor of a matrix that was not is meaningless.
    """
    if not matrices.is_cuda or matrices.shape[-1] <= 2 * BLOCK:
        lower, info = cholesky_ex(matrices)
        # The library may answer in column order; the kernels walk along rows.
        return lower.contiguous(), (info == 0) & torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all(-1)
    with full_float32():
        return _blocked(matrices)


def _blocked(a: Tensor) -> tuple[Tensor, Tensor]:
    """Left-looking, in place, one panel of BLOCK columns at a time; below the diagonal block all is matrix products.

    The libraries' batched routine treats large matrices one by one; this keeps the device full with all of them.
    """
    n = a.shape[-1]
    ok = torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        panel = a[:, start:, start:stop]
        if start:
            torch.baddbmm(panel, a[:, start:, :start], a[:, start:stop, :start].mT, alpha=-1, out=panel)
        top, info = cholesky_ex(panel[:, : stop - start])
        ok &= info == 0
        if stop < n:
            eye = torch.eye(stop - start, device=a.device).expand_as(top)
            inverse = solve_lower(top, eye)
            panel[:, stop - start :] = panel[:, stop - start :] @ inverse.mT
        panel[:, : stop - start] = top
        a[:, start:stop, stop:] = 0
    ok &= torch.isfinite(a.diagonal(dim1=-2, dim2=-1)).all(-1)
    return a, ok


def damped_cholesky(matrices: Tensor, mean: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Lower factors of symmetric matrices [E, n, n] with `damping` times their mean diagonal `mean` [E] added to it.

    Also [E] how many times that was added (ESCALATIONS). A matrix that has no factor even at the most (no energy, or
    not finite) gets the identity, and 0.
    """
    sound = torch.isfinite(matrices).flatten(1).all(1) & (mean > 0)
    lower, good = cholesky(_ridged(matrices, damping * mean))
    added = (good & sound).float()
    if bool((added == 0).any()):
        lower[added == 0] = torch.eye(matrices.shape[-1], device=matrices.device)
    for times in ESCALATIONS[1:]:
        chosen = (sound & (added == 0)).nonzero().flatten()
        if len(chosen):
            found, good = cholesky(_ridged(matrices[chosen], times * damping * mean[chosen]))
            lower[chosen[good]], added[chosen[good]] = found[good], times
    return lower, added


def _ridged(matrices: Tensor, ridge: Tensor) -> Tensor:
    """A copy with `ridge` [E] added to the diagonals."""
    out = matrices.clone()
    out.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    return out


def divide(rows: Tensor, lower: Tensor) -> Tensor:
    """X of X C C^T = rows for rows [E, R, n] and lower triangles C [E, n, n]; on CUDA the input may be overwritten."""
    if rows.is_cuda and lower.shape[-1] % BLOCK == 0:
        with full_float32():
            return _divided(rows, lower)
    return torch.cholesky_solve(rows.mT, lower).mT


def _divided(rows: Tensor, lower: Tensor) -> Tensor:
    """In place, BLOCK columns at a time, all matrices together: the library's routine takes one after the other."""
    spans = [slice(start, start + BLOCK) for start in range(0, lower.shape[-1], BLOCK)]
    blocks = torch.stack([lower[:, span, span] for span in spans])
    inverse = solve_lower(blocks, torch.eye(BLOCK, device=rows.device).expand_as(blocks))
    for place, span in enumerate(spans):
        part = rows[:, :, span]
        if place:
            part.baddbmm_(rows[:, :, : span.start], lower[:, span, : span.start].mT, alpha=-1)
        part.copy_(part @ inverse[place].mT)
    for place, span in reversed(list(enumerate(spans))):
        part = rows[:, :, span]
        if span is not spans[-1]:
            part.baddbmm_(rows[:, :, span.stop :], lower[:, span.stop :, span], alpha=-1)
        part.copy_(part @ inverse[place])
    return rows


def permute_both(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [E, n, n] by order [E, n]."""
    rows = matrix.gather(1, order.unsqueeze(-1).expand_as(matrix))
    return rows.gather(2, order.unsqueeze(1).expand_as(matrix))
