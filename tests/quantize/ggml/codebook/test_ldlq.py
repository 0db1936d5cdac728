"""Block LDLQ and descent into codebooks: the factor's definition, the objective against plain encoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmquant.quantize.ggml.codebook import columns as iquant_columns
from mmquant.quantize.ggml.codebook import encode as iquants
from mmquant.quantize.ggml.codebook import ldlq as iquant_feedback
from mmquant.quantize.ggml.codebook.layout import DELTA, LAYOUTS, SUPER, field_values, unpack_fields
from mmquant.quantize.ggml.codebook.ldlq import BlockFactor, encode_blocks_with_feedback, factor_blocks
from mmquant.quantize.ggml.codebook.search import choose_torch
from mmquant.quantize.ggml.factor import factor_moments
from mmquant.quantize.ggml.types import GGMLType

KINDS = [GGMLType[name] for name in LAYOUTS]
FAST = iquants.EFFORTS["fast"]


def moments(experts: int, n: int, rank: int) -> Tensor:
    """Second moments of correlated inputs of very different sizes: [E, n, n]."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(experts, n, rank, generator=generator) * torch.rand(experts, 1, rank, generator=generator) ** 2
    size = torch.randn(experts, n, generator=generator).exp()
    second = mixed @ mixed.mT / rank + 0.3 * torch.eye(n)
    return second * size.unsqueeze(1) * size.unsqueeze(2)


def weights(experts: int, rows: int, n: int) -> Tensor:
    return torch.randn(experts, rows, n, generator=torch.Generator().manual_seed(4)) * 0.02


def loss(error: Tensor, second: Tensor) -> Tensor:
    """tr(E H E^T) of each matrix, [E]."""
    return torch.einsum("ern,enm,erm->e", error, second, error)


def decoded(data: Tensor, kind: GGMLType, shape: torch.Size) -> Tensor:
    return iquants.decode_codebook(data.flatten(0, 1), kind, shape[-1]).reshape(shape)


def factored(second: Tensor, kind: GGMLType, damping: float = 0.02) -> BlockFactor:
    return factor_blocks(factor_moments(second, damping), kind)


def plain(rows: Tensor, kind: GGMLType, second: Tensor) -> Tensor:
    importance = second.diagonal(dim1=1, dim2=2)
    return torch.stack([iquants.encode_codebook(w, kind, d) for w, d in zip(rows, importance, strict=True)])


def in_order(second: Tensor, order: Tensor) -> Tensor:
    columns = (order.unsqueeze(-1) * SUPER + torch.arange(SUPER)).flatten(1)
    return torch.stack([h[c][:, c] for h, c in zip(second, columns, strict=True)])


@pytest.mark.parametrize("kind", [GGMLType.IQ3_S, GGMLType.IQ2_XS])
def test_the_factor_is_block_ldl_of_the_damped_moments(kind: GGMLType) -> None:
    second = moments(2, 512, 100)
    known = factored(second, kind, damping=0.03)
    unit = 4 if kind is GGMLType.IQ3_S else 8
    blocks = torch.stack([torch.block_diag(*m) for m in known.metric])
    expected = in_order(second, known.order) + 0.03 * second.diagonal(dim1=1, dim2=2).mean(1).reshape(
        -1, 1, 1
    ) * torch.eye(512)
    assert torch.allclose(known.lower @ blocks @ known.lower.mT, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    assert torch.allclose(known.moments, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    own = known.lower.unflatten(1, (-1, unit)).unflatten(-1, (-1, unit)).diagonal(dim1=1, dim2=3)
    assert torch.allclose(own, torch.eye(unit).reshape(1, unit, unit, 1).expand_as(own), atol=1e-4)
    energy = in_order(second, known.order).diagonal(dim1=1, dim2=2).unflatten(1, (-1, SUPER)).mean(-1)
    assert bool((energy.diff(dim=1) >= 0).all())  # the last place, which goes first, has the most


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_lowers_the_output_error(kind: GGMLType) -> None:
    second, rows = moments(2, 512, 128), weights(2, 12, 512)
    before = loss(rows - decoded(plain(rows, kind, second), kind, rows.shape), second)
    known = factored(second, kind)
    swept = loss(
        rows - decoded(encode_blocks_with_feedback(rows, kind, known, FAST, passes=0), kind, rows.shape), second
    )
    descended = loss(
        rows - decoded(encode_blocks_with_feedback(rows, kind, known, FAST, passes=1), kind, rows.shape), second
    )
    assert bool((swept < 0.88 * before).all())
    assert bool((descended < 0.97 * swept).all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_is_nearest_to_what_the_theorem_says(kind: GGMLType) -> None:
    """From the result alone: with E = W - Q and the dense L, each unit is the nearest to W + E (L - I) under D."""
    layout = LAYOUTS[kind.name]
    second, rows = moments(1, 512, 100), weights(1, 5, 512)
    known = factored(second, kind)
    data = encode_blocks_with_feedback(rows, kind, known, FAST, passes=0).reshape(-1, layout.bytes)
    fields = unpack_fields(data, layout)
    columns = (known.order[0].unsqueeze(-1) * SUPER + torch.arange(SUPER)).flatten()
    target = rows[0][:, columns].double()
    quantized = field_values(fields, layout).reshape(5, 512)[:, columns].double()
    target = target + (target - quantized) @ (known.lower[0].double() - torch.eye(512))
    scale = iquants.block_scales(fields.scale.float(), fields.level, layout).reshape(5, -1)
    scale = scale.repeat_interleave(layout.shared, 1)[:, columns]
    minus = fields.minus.reshape(5, -1).repeat_interleave(8, 1)[:, columns]
    unit = iquant_columns.unit_of(layout)
    for first in range(0, 512, unit):
        span = slice(first, first + unit)
        weight = known.metric[0, first // unit].diagonal().expand(5, -1).contiguous()
        x, step = target[:, span].float(), scale[:, first : first + 1]
        shared = layout.name == "IQ1_S"
        shift = torch.where(minus[:, first : first + 1], -DELTA, DELTA) * step if shared else torch.zeros_like(step)
        delta = 0.0 if shared else DELTA
        best = choose_torch(x - shift, weight, step, layout, delta)
        nearest = iquant_columns.point_values(best, step, layout, delta) + shift
        errors = [(weight * (x - q) ** 2).sum(1) for q in (quantized[:, span].float(), nearest)]
        assert torch.allclose(*errors, rtol=2e-3, atol=1e-9)


def test_the_scale_of_a_super_block_is_at_its_least_square() -> None:
    layout = LAYOUTS["IQ3_S"]
    second, rows = moments(1, 256, 64), weights(1, 40, 256)
    fields = unpack_fields(
        encode_blocks_with_feedback(rows * 1.1, GGMLType.IQ3_S, factored(second, GGMLType.IQ3_S)).flatten(0, 1),
        layout,
    )
    decoded = field_values(fields, layout).unsqueeze(0)
    before = loss(rows - decoded, second)
    columns, pull = decoded.mT.contiguous(), second @ (rows - decoded).mT
    after = iquant_feedback.rescale(columns, pull, second, fields)
    decoded = columns.mT
    assert torch.allclose(field_values(after, layout), decoded[0], atol=1e-7)
    assert torch.allclose(second @ (rows - decoded).mT, pull, atol=1e-4 * float(second.max()))
    assert float(loss(rows - decoded, second)) < 0.6 * float(before)
    bent = (decoded @ second * decoded).sum(-1)
    left = (pull.mT * decoded).sum(-1) / bent  # what is left of the gain: the rounding of fp16
    assert float(left.abs().max()) < 2.0**-11


def test_descent_never_raises_its_objective() -> None:
    second, rows = moments(1, 512, 64), weights(1, 9, 512)
    known = factored(second, GGMLType.IQ3_XXS, damping=0.1)
    damped = second + 0.1 * second.diagonal(dim1=1, dim2=2).mean() * torch.eye(512)
    losses = []
    for passes in (0, 1, 3):
        data = encode_blocks_with_feedback(rows, GGMLType.IQ3_XXS, known, FAST, passes)
        losses.append(float(loss(rows - decoded(data, GGMLType.IQ3_XXS, rows.shape), damped)))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("kind", [GGMLType.IQ2_XXS, GGMLType.IQ1_S, GGMLType.IQ1_M])
def test_diagonal_moments_give_plain_rounding(kind: GGMLType) -> None:
    """Without correlations nothing is fed back; what is left is the nearest point at searched scales."""
    rows = weights(1, 5, 512)
    size = torch.rand(1, 512, generator=torch.Generator().manual_seed(0)) + 0.1
    second = torch.diag_embed(size)
    known = factored(second, kind, damping=1e-6)
    effort = iquants.EFFORTS["default"]  # as in plain()
    fed = decoded(encode_blocks_with_feedback(rows, kind, known, effort, passes=0), kind, rows.shape)
    assert torch.allclose(fed, decoded(plain(rows, kind, second), kind, rows.shape), atol=1e-7)


def test_a_matrix_without_energy_is_rounded_plainly_and_does_not_touch_others() -> None:
    kind = GGMLType.IQ2_XXS
    second, rows = moments(3, 256, 64), weights(3, 4, 256)
    alone = encode_blocks_with_feedback(rows[:1], kind, factored(second[:1], kind), FAST)
    second[1] = 0
    second[2, 3, 7] = float("nan")
    data = encode_blocks_with_feedback(rows, kind, factored(second, kind), FAST)
    assert torch.equal(data[0], alone[0])
    for e in (1, 2):
        off = rows[e] - iquants.decode_codebook(data[e], kind, 256)
        assert float(off.square().sum()) < 0.2 * float(rows[e].square().sum())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_is_as_good_as_the_cpu(kind: GGMLType) -> None:
    second, rows = moments(2, 768, 200), weights(2, 150, 768)
    known = factored(second, kind)
    on_gpu = BlockFactor(known.order.cuda(), known.lower.cuda(), known.metric.cuda(), known.moments.cuda())
    for passes in (0, 2):
        ours = encode_blocks_with_feedback(rows, kind, known, FAST, passes)
        theirs = encode_blocks_with_feedback(rows.cuda(), kind, on_gpu, FAST, passes).cpu()
        losses = [loss(rows - decoded(data, kind, rows.shape), second).sum() for data in (ours, theirs)]
        assert losses[1] < 1.03 * losses[0]


def test_zero_rows_and_one_row() -> None:
    kind = GGMLType.IQ3_S
    second, rows = moments(1, 256, 64), weights(1, 3, 256)
    rows[0, 1] = 0
    data = encode_blocks_with_feedback(rows, kind, factored(second, kind), FAST)
    assert bool((iquants.decode_codebook(data[0], kind, 256)[1] == 0).all())
    assert torch.equal(data[:, 2:], encode_blocks_with_feedback(rows[:, 2:], kind, factored(second, kind), FAST))


def test_bad_input_is_refused() -> None:
    known = factored(moments(1, 256, 32), GGMLType.IQ3_S)
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode_blocks_with_feedback(torch.full((1, 2, 256), float("nan")), GGMLType.IQ3_S, known)
    with pytest.raises(ValueError, match="the factor is of"):
        encode_blocks_with_feedback(weights(1, 2, 512), GGMLType.IQ3_S, known)
    with pytest.raises(ValueError, match="the factor is for groups of 4"):
        encode_blocks_with_feedback(weights(1, 2, 256), GGMLType.IQ2_S, known)
    assert iquant_columns.unit_of(LAYOUTS["IQ3_XXS"]) == 8  # two points share one parity
