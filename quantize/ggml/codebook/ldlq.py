"""Block LDLQ into the codebooks of GGUF: 8 (or 4) columns are rounded together and absorb earlier errors.

With H = C C^T (C lower triangular) and E = W - Q, tr(E H E^T) is the sum over groups k of columns of ||e_k C_kk +
sum_{j>k} e_j C_jk||^2. Going from the last group to the first, group k is therefore best rounded at w_k + sum_{j>k}
e_j L_jk, L_jk = C_jk C_kk^-1, and its own error is measured by D_k = C_kk C_kk^T: the block form of
https://arxiv.org/abs/2307.13304 (theorem 6), as in https://arxiv.org/abs/2402.04396. The order of super-blocks is
free (it does not reach the file): those with the most energy go first. A super-block's scales are searched when its
turn has come, on the weights that hold the errors made so far.

On CUDA the products between super-blocks are TF32's: factors of 11 bits moved the objective by less than 1 % to either
side, also where one direction holds nearly all energy, and these products are most of the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmquant.errors import InputError

from ...linear_algebra import full_float32, inv, solve_lower
from ...overflow import FP16_MAX
from ..factor import Factor
from ..types import GGMLType
from .columns import descend_columns, new_codebook_block, sweep_columns, unit_of
from .encode import EFFORTS, CodebookEffort, check_rows, layout_of, scaled, search_fields
from .layout import SUPER, Fields, Layout, pack_fields

PASSES = 1  # of coordinate descent after the sweep


@dataclass(frozen=True)
class BlockFactor:
    """Of E matrices of mean second moments, super-blocks of columns in processing order (the last goes first).

    order   [E, n / 256] int64: the super-block at each place
    lower   [E, n, n] float32: L, unit on the diagonal groups
    metric  [E, n / unit, unit, unit] float32: D_k
    moments [E, n, n] float32: H, damped
    """

    order: Tensor
    lower: Tensor
    metric: Tensor
    moments: Tensor


def factor_blocks(known: Factor, kind: GGMLType) -> BlockFactor:
    """The block form of a factor for `kind`."""
    unit = unit_of(layout_of(kind, known.moments.shape))
    with full_float32():
        blocks = torch.unflatten(known.lower, -1, (-1, unit))  # [E, n, groups, unit]
        own = _own(known.lower, unit)
        inverse = solve_lower(own, torch.eye(unit, device=own.device).expand_as(own))
        unit_lower = torch.einsum("enku,ekuv->enkv", blocks, inverse).reshape(known.lower.shape)
        return BlockFactor(known.order, unit_lower, own @ own.mT, known.moments)


def _own(matrices: Tensor, unit: int) -> Tensor:
    """Blocks on the diagonal of [E, n, n]: [E, n / unit, unit, unit]."""
    blocks = torch.unflatten(
        torch.unflatten(matrices, 1, (-1, unit)), -1, (-1, unit)
    )  # [E, groups, unit, groups, unit]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class CodebookState:
    """E matrices being rounded, columns in processing order.

    weight, decoded, error  [E, n, R] float32; error is weight - decoded, 0 where nothing is rounded yet
    fields                  of each place, E * R super-blocks; None where nothing is rounded yet
    """

    weight: Tensor
    decoded: Tensor
    error: Tensor
    fields: list[Fields | None]


def encode_blocks_with_feedback(
    rows: Tensor, kind: GGMLType, known: BlockFactor, effort: CodebookEffort = EFFORTS["fast"], passes: int = PASSES
) -> Tensor:
    """Bytes of E matrices with small tr((W - Q) H (W - Q)^T).

    rows     [E, R, n] float32
    known    `factor_blocks` of the moments H [E, n, n] for the same kind
    effort   of the search of scales; wider ones bring 0.1 (2 bits) to 0.9 % (3 bits) here, at twice the time
    passes   rounds of coordinate descent after the sweep
    returns  uint8 [E, R, n / 256 * bytes of a super-block]

    Raises ValueError as `encode.encode` does.
    """
    layout = layout_of(kind, rows.shape)
    check_rows(rows, layout)
    if known.order.shape != (rows.shape[0], rows.shape[2] // SUPER):
        raise InputError(
            f"{kind.name}: rows {tuple(rows.shape)}, the factor is of moments {tuple(known.moments.shape)}"
        )
    if known.metric.shape[-1] != unit_of(layout):
        raise InputError(
            f"{kind.name}: the factor is for groups of {known.metric.shape[-1]}, expected {unit_of(layout)}"
        )
    state = _started(rows, known)
    with full_float32():
        sweep_codebook(state, known, layout, effort)
        for _ in range(passes):
            descend(state, known, layout)
    out = torch.empty(*rows.shape[:2], len(state.fields), layout.bytes, dtype=torch.uint8, device=rows.device)
    which = torch.arange(rows.shape[0], device=rows.device)
    for place, fields in enumerate(state.fields):
        assert fields is not None
        out[which, :, known.order[:, place]] = pack_fields(fields, layout).reshape(*rows.shape[:2], -1)
    return out.flatten(2)


def _started(rows: Tensor, known: BlockFactor) -> CodebookState:
    experts, count, n = rows.shape
    weight = torch.empty(experts, n, count, device=rows.device)
    which, blocks = torch.arange(experts, device=rows.device), torch.unflatten(rows, 2, (-1, SUPER))
    for place in range(n // SUPER):
        weight[:, _span(place)] = blocks[which, :, known.order[:, place]].mT
    return CodebookState(weight, torch.zeros_like(weight), torch.zeros_like(weight), [None] * (n // SUPER))


def _span(place: int) -> slice:
    return slice(place * SUPER, (place + 1) * SUPER)


def sweep_codebook(state: CodebookState, known: BlockFactor, layout: Layout, effort: CodebookEffort) -> None:
    """Round super-blocks from the last place to the first, each after the errors of those before it are fed in."""
    importance, metric = (m.diagonal(dim1=-2, dim2=-1).flatten(1) for m in (known.moments, known.metric))
    for place in range(len(state.fields) - 1, -1, -1):
        span = _span(place)
        source = state.weight[:, span]
        target = source.clone()
        if span.stop < state.weight.shape[1]:
            with full_float32(False):
                target.baddbmm_(known.lower[:, span.stop :, span].mT, state.error[:, span.stop :])
        fields = _searched(target, importance[:, span], layout, effort)
        block = new_codebook_block(layout, fields, metric[:, span])
        sweep_columns(block, target, source, state.decoded[:, span], known.lower[:, span, span])
        state.fields[place], state.error[:, span] = fields, target


def _searched(target: Tensor, importance: Tensor, layout: Layout, effort: CodebookEffort) -> Fields:
    """Scales and levels of super-blocks [E, 256, R] under importance [E, 256]; the points are to come."""
    blocks = scaled(target.mT.reshape(-1, SUPER), importance)
    return search_fields(replace(blocks, weight=blocks.weight.repeat_interleave(target.shape[2], 0)), layout, effort)


def descend(state: CodebookState, known: BlockFactor, layout: Layout) -> None:
    """One round of coordinate descent on tr(E H E^T): every unit of columns again, all others held.

    The scale of each super-block follows by least squares. A change is kept only where it lowers the objective.
    """
    unit = unit_of(layout)
    inverse = inv(_own(known.moments, unit)).contiguous()
    diagonal = known.moments.diagonal(dim1=-2, dim2=-1)
    for place in range(len(state.fields) - 1, -1, -1):
        span = _span(place)
        fields, decoded, moments = state.fields[place], state.decoded[:, span], known.moments[:, span, span]
        assert fields is not None
        with full_float32(False):
            pull = torch.bmm(known.moments[:, :, span].mT, state.error)  # (E H) of this super-block
        fields = rescale(decoded, pull, moments, fields)
        block = new_codebook_block(layout, fields, diagonal[:, span])
        own = inverse[:, span.start // unit : span.stop // unit]
        descend_columns(block, pull, decoded, moments, own)
        state.fields[place], state.error[:, span] = fields, state.weight[:, span] - decoded


def rescale(decoded: Tensor, pull: Tensor, moments: Tensor, fields: Fields) -> Fields:
    """The scale that is best with all else held; `decoded` and `pull` [E, 256, R] follow it in place."""
    bent = torch.bmm(moments.mT, decoded)
    curve, slope = (bent * decoded).sum(1), (pull * decoded).sum(1)  # of the objective in the scale, [E, R]
    before = fields.scale.float().reshape(curve.shape)
    stored = (before * (1 + slope / curve.clamp(min=1e-30))).clamp(0, FP16_MAX).half()
    change = stored.float() / before.clamp(min=1e-30) - 1
    better = change * (change * curve - 2 * slope) < 0
    change = torch.where(better, change, torch.zeros_like(change)).unsqueeze(1)
    pull.addcmul_(bent, change, value=-1)
    decoded *= 1 + change
    return replace(fields, scale=torch.where(better, stored, fields.scale.reshape(curve.shape)).flatten())
