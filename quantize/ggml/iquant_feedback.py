"""Block LDLQ into the vector codebooks of GGUF: 8 (or 4) columns are rounded together and make good earlier errors.

With H = C C^T (C lower triangular) and E = W - Q, tr(E H E^T) is the sum over groups k of columns of ||e_k C_kk +
sum_{j>k} e_j C_jk||^2. Going from the last group to the first, group k is therefore best rounded at w_k + sum_{j>k}
e_j L_jk, L_jk = C_jk C_kk^-1, and its own error is measured by D_k = C_kk C_kk^T: the block form of
https://arxiv.org/abs/2307.13304 (theorem 6), as in https://arxiv.org/abs/2402.04396. The order of super-blocks is
free (it does not reach the file): those with the most energy go first. A super-block's scales are searched when its
turn has come, on the weights that hold the errors made so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linear_algebra import cholesky, full_float32
from .grids import points_on
from .iquants import EFFORTS, LARGEST, Effort, block_scales, check_rows, layout_of, scaled, search
from .iquants_layout import DELTA, SUPER, Fields, Layout, Signs, pack, unpack_bits, values
from .iquants_search import Choice, choose
from .types import GGMLType

DAMPING = 0.02
ESCALATIONS = (1.0, 10.0, 100.0)  # a failed factorization is tried again with this many times the damping
PASSES = 1  # of coordinate descent after the sweep


@dataclass(frozen=True)
class Factor:
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


def unit_of(layout: Layout) -> int:
    """Columns that must be rounded together: a point, or the eight weights whose signs share a parity."""
    return 8 if layout.signs is Signs.PARITY else layout.group


def factor(second: Tensor, kind: GGMLType, damping: float = DAMPING) -> Factor:
    """Factor mean second moments [E, n, n] for `kind`; `damping` is the share of the mean diagonal that is added.

    A matrix that has no factor even at 100 times the damping (no energy, or not finite) gets the identity.
    """
    layout = layout_of(kind, second.shape)
    experts, n = second.shape[0], second.shape[-1]
    diagonal = second.diagonal(dim1=-2, dim2=-1).nan_to_num(0.0, 0.0, 0.0)
    order = diagonal.unflatten(-1, (-1, SUPER)).mean(-1).argsort(dim=-1, stable=True)
    columns = _columns(order)
    ordered = second.gather(1, columns.unsqueeze(2).expand_as(second)).gather(2, columns.unsqueeze(1).expand_as(second))
    with full_float32():
        lower = _cholesky(ordered, diagonal.mean(-1), damping)
        unit = unit_of(layout)
        blocks = lower.unflatten(-1, (-1, unit))  # [E, n, groups, unit]
        own = _own(lower, unit)
        inverse = torch.linalg.solve_triangular(own, torch.eye(unit, device=own.device).expand_as(own), upper=False)
        unit_lower = torch.einsum("enku,ekuv->enkv", blocks, inverse).reshape(experts, n, n)
        return Factor(order, unit_lower, own @ own.mT, lower @ lower.mT)


def _own(matrices: Tensor, unit: int) -> Tensor:
    """Blocks on the diagonal of [E, n, n]: [E, n / unit, unit, unit]."""
    blocks = matrices.unflatten(1, (-1, unit)).unflatten(-1, (-1, unit))  # [E, groups, unit, groups, unit]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()


def _columns(order: Tensor) -> Tensor:
    """Super-blocks [E, n / 256] -> columns [E, n]."""
    return (order.unsqueeze(-1) * SUPER + torch.arange(SUPER, device=order.device)).flatten(1)


def _cholesky(matrices: Tensor, mean: Tensor, damping: float) -> Tensor:
    """Lower factors of damped matrices [E, n, n]."""
    usable = torch.isfinite(matrices).flatten(1).all(1) & (mean > 0)
    eye = torch.eye(matrices.shape[-1], device=matrices.device)
    result = eye.expand_as(matrices).clone()
    for times in ESCALATIONS:
        todo = usable.nonzero().flatten()
        if not len(todo):
            break
        lower, ok = cholesky(matrices[todo] + (times * damping * mean[todo]).reshape(-1, 1, 1) * eye)
        result[todo[ok]] = lower[ok]
        usable[todo[ok]] = False
    return result


@dataclass(frozen=True)
class State:
    """E matrices being rounded, columns in processing order.

    weight, decoded  [E, R, n] float32
    fields           of each place, E * R super-blocks; None where nothing is rounded yet
    """

    weight: Tensor
    decoded: Tensor
    fields: list[Fields | None]


def encode_with_feedback(
    rows: Tensor, kind: GGMLType, known: Factor, effort: Effort = EFFORTS["fast"], passes: int = PASSES
) -> Tensor:
    """Bytes of E matrices with small tr((W - Q) H (W - Q)^T).

    rows     [E, R, n] float32
    known    `factor` of the moments H [E, n, n] for the same kind
    effort   of the search of scales; wider ones bring 0.1 (2 bits) to 0.9 % (3 bits) here, at twice the time
    passes   rounds of coordinate descent after the sweep
    returns  uint8 [E, R, n / 256 * bytes of a super-block]

    Raises ValueError as `iquants.encode` does.
    """
    layout = layout_of(kind, rows.shape)
    check_rows(rows, layout)
    if known.order.shape != (rows.shape[0], rows.shape[2] // SUPER):
        raise ValueError(
            f"{kind.name}: rows {tuple(rows.shape)}, the factor is of moments {tuple(known.moments.shape)}"
        )
    if known.metric.shape[-1] != unit_of(layout):
        raise ValueError(
            f"{kind.name}: the factor is for groups of {known.metric.shape[-1]}, expected {unit_of(layout)}"
        )
    weight = rows.float().gather(2, _columns(known.order).unsqueeze(1).expand_as(rows))
    state = State(weight, torch.zeros_like(weight), [None] * (rows.shape[2] // SUPER))
    with full_float32():
        sweep(state, known, layout, effort)
        for _ in range(passes):
            descend(state, known, layout)
    out = torch.empty(*rows.shape[:2], len(state.fields), layout.bytes, dtype=torch.uint8, device=rows.device)
    which = torch.arange(rows.shape[0], device=rows.device)
    for place, fields in enumerate(state.fields):
        assert fields is not None
        out[which, :, known.order[:, place]] = pack(fields, layout).reshape(*rows.shape[:2], -1)
    return out.flatten(2)


def sweep(state: State, known: Factor, layout: Layout, effort: Effort) -> None:
    """Round super-blocks from the last place to the first, each after the errors of those before it are fed in."""
    n = state.weight.shape[2]
    errors = torch.zeros_like(state.weight)
    for place in range(n // SUPER - 1, -1, -1):
        span = slice(place * SUPER, (place + 1) * SUPER)
        part = state.weight[..., span]
        if span.stop < n:
            part = torch.baddbmm(part, errors[..., span.stop :], known.lower[:, span.stop :, span])
        fields = _sweep_block(part, state.weight[..., span], known, place, layout, effort)
        state.fields[place] = fields
        state.decoded[..., span] = values(fields, layout).reshape(part.shape)
        errors[..., span] = state.weight[..., span] - state.decoded[..., span]


def _sweep_block(part: Tensor, weight: Tensor, known: Factor, place: int, layout: Layout, effort: Effort) -> Fields:
    """One super-block of all rows: part, weight [E, R, 256] with the errors of others fed in, and as they came."""
    experts, count, _ = part.shape
    span = slice(place * SUPER, (place + 1) * SUPER)
    importance = known.moments.diagonal(dim1=-2, dim2=-1)[:, None, span].expand_as(part)
    blocks = scaled(part.reshape(-1, SUPER), importance.reshape(-1, SUPER))
    fields = search(blocks, layout, effort)
    scale = block_scales(fields.scale.float() / blocks.unit, fields.level, layout)  # [E * R, blocks]
    target = blocks.x.reshape(part.shape)  # in units of the super-block's largest magnitude
    source = (weight.reshape(-1, SUPER) / blocks.unit.unsqueeze(1)).reshape(part.shape)
    unit = unit_of(layout)
    for first in range(SUPER - unit, -1, -unit):
        columns = slice(first, first + unit)
        diagonal = known.metric[:, span.start // unit + first // unit].diagonal(dim1=-2, dim2=-1)
        decoded = _round(target[..., columns], diagonal, scale[:, first // layout.shared], first, fields, layout)
        if first:
            error = source[..., columns] - decoded.reshape(experts, count, unit)
            target[..., :first].baddbmm_(error, known.lower[:, span, span][:, columns, :first])
    return fields


def _round(x: Tensor, diagonal: Tensor, scale: Tensor, first: int, fields: Fields, layout: Layout) -> Tensor:
    """Nearest points to x [E, R, unit] under the diagonal metric [E, unit]; written into `fields`, returned decoded."""
    found = _nearest(x, diagonal, scale, fields.minus[:, first // 8], layout)
    _write(found, fields, first, layout)
    return found.decoded


@dataclass(frozen=True)
class Rounded:
    """A unit of columns of N rows: code [N, points], signs uint8 [N], minus bool [N], decoded [N, unit]."""

    code: Tensor
    signs: Tensor
    minus: Tensor
    decoded: Tensor


def _write(found: Rounded, fields: Fields, first: int, layout: Layout, where: Tensor | None = None) -> None:
    """Put a unit at column `first` into the fields, for the rows `where` (all when None)."""
    unit = found.decoded.shape[1]
    places = slice(first // layout.group, (first + unit) // layout.group)
    octet, shift = first // 8, first % 8
    keep = fields.signs[:, octet] & (255 - (((1 << unit) - 1) << shift))
    signs = keep | (found.signs << shift)
    if where is None:
        fields.code[:, places], fields.signs[:, octet], fields.minus[:, octet] = found.code, signs, found.minus
        return
    fields.code[:, places] = torch.where(where.unsqueeze(1), found.code, fields.code[:, places])
    fields.signs[:, octet] = torch.where(where, signs, fields.signs[:, octet])
    fields.minus[:, octet] = torch.where(where, found.minus, fields.minus[:, octet])


def _nearest(x: Tensor, diagonal: Tensor, scale: Tensor, minus: Tensor, layout: Layout) -> Rounded:
    """Nearest points to x [E, R, unit]; minus [E * R]: the delta of IQ1_S, chosen for 32 columns with the scales."""
    unit = x.shape[-1]
    weight = diagonal.unsqueeze(1).expand_as(x).reshape(-1, unit)
    x, scale = x.reshape(-1, unit), scale.unsqueeze(1)
    shared = layout.name == "IQ1_S"
    if shared:
        shift = torch.where(minus, -DELTA, DELTA).unsqueeze(1) * scale
        choice = choose(x - shift, weight, scale, layout, 0.0)
        return Rounded(choice.code, choice.signs[:, 0], minus, values_of(choice, scale, layout, 0.0) + shift)
    choice = choose(x, weight, scale, layout)
    minus = choice.minus[:, 0] if layout.signs is Signs.DELTA else minus
    return Rounded(choice.code, choice.signs[:, 0], minus, values_of(choice, scale, layout, DELTA))


def values_of(choice: Choice, scale: Tensor, layout: Layout, delta: float) -> Tensor:
    """What a choice stands for, [B, width], with scale [B, 1]."""
    points = points_on(layout.name, scale.device)[choice.code.long()].flatten(1)
    if layout.signs is Signs.DELTA:
        return scale * (points + torch.where(choice.minus, -delta, delta).repeat_interleave(8, 1))
    return scale * points * (1 - 2 * unpack_bits(choice.signs).flatten(1)[:, : points.shape[1]].float())


def descend(state: State, known: Factor, layout: Layout) -> None:
    """One round of coordinate descent on tr(E H E^T): every unit of columns again, all others held; the scale of each
    super-block by least squares. A change is kept only where it lowers the objective."""
    n = state.weight.shape[2]
    for place in range(n // SUPER - 1, -1, -1):
        span = slice(place * SUPER, (place + 1) * SUPER)
        fields = state.fields[place]
        assert fields is not None
        moments = known.moments[:, span, span]
        pull = torch.bmm(state.weight - state.decoded, known.moments[:, :, span])  # (E H) of this super-block
        fields = rescale(state.decoded[..., span], pull, moments, fields, layout)
        _descend_block(state.decoded[..., span], pull, moments, fields, layout)
        state.fields[place] = fields


def rescale(decoded: Tensor, pull: Tensor, moments: Tensor, fields: Fields, layout: Layout) -> Fields:
    """The scale that is best with all else held; `decoded` and `pull` [E, R, 256] follow it in place."""
    bent = torch.bmm(decoded, moments)
    gain = (pull * decoded).sum(-1) / (bent * decoded).sum(-1).clamp(min=1e-30)
    stored = (fields.scale.float() * (1 + gain.flatten())).clamp(0, LARGEST).half()
    change = (stored.float() / fields.scale.float().clamp(min=1e-30) - 1).reshape(gain.shape).unsqueeze(-1)
    loss = (change * ((bent * change - 2 * pull) * decoded)).sum(-1, keepdim=True)
    change = torch.where(loss < 0, change, torch.zeros_like(change))
    pull -= bent * change
    decoded *= 1 + change
    return replace(fields, scale=torch.where((change != 0).flatten(), stored, fields.scale))


def _descend_block(decoded: Tensor, pull: Tensor, moments: Tensor, fields: Fields, layout: Layout) -> None:
    experts, count, _ = decoded.shape
    unit = unit_of(layout)
    size = decoded.abs().amax(-1).flatten().clamp(min=1e-30)  # points are sought at a magnitude near 1
    scale = block_scales(fields.scale.float() / size, fields.level, layout)
    inverse = torch.linalg.inv(_own(moments, unit))
    for first in range(SUPER - unit, -1, -unit):
        columns = slice(first, first + unit)
        metric = moments[:, columns, columns]
        wanted = torch.baddbmm(decoded[..., columns], pull[..., columns], inverse[:, first // unit])
        wanted = wanted / size.reshape(experts, count, 1)
        diagonal = metric.diagonal(dim1=-2, dim2=-1)
        found = _nearest(wanted, diagonal, scale[:, first // layout.shared], fields.minus[:, first // 8], layout)
        change = (found.decoded * size.unsqueeze(1)).reshape(experts, count, unit) - decoded[..., columns]
        loss = (change * (torch.bmm(change, metric) - 2 * pull[..., columns])).sum(-1, keepdim=True)
        change = torch.where(loss < 0, change, torch.zeros_like(change))
        _write(found, fields, first, layout, (loss < 0).flatten())
        if first:
            pull[..., :first].baddbmm_(change, moments[:, columns, :first], alpha=-1)
        decoded[..., columns] += change
