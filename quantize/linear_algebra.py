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


def damped_cholesky(matrices: Tensor, mean: Tensor, damping: float) -> Tensor:
    """Lower factors of symmetric matrices [E, n, n] with `damping` times their mean diagonal `mean` [E] added to it.

    A matrix that has no factor even at 100 times the damping (no energy, or not finite) gets the identity.
    """
    todo = torch.isfinite(matrices).flatten(1).all(1) & (mean > 0)
    eye = torch.eye(matrices.shape[-1], device=matrices.device)
    result = eye.expand_as(matrices).clone()
    for times in ESCALATIONS:
        chosen = todo.nonzero().flatten()
        if not len(chosen):
            break
        lower, good = cholesky(matrices[chosen] + (times * damping * mean[chosen]).view(-1, 1, 1) * eye)
        result[chosen[good]] = lower[good]
        todo[chosen[good]] = False
    return result


def permute_both(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [E, n, n] by order [E, n]."""
    rows = matrix.gather(1, order.unsqueeze(-1).expand_as(matrix))
    return rows.gather(2, order.unsqueeze(1).expand_as(matrix))
