"""Scale searches of the ggml grid types: ggml's own encoders, brute force, the error's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import ggml_lib
from mmquant.convert.open import open_source
from mmquant.quantize.ggml import codec
from mmquant.quantize.ggml.scalar import mxfp4
from mmquant.quantize.ggml.scalar.effort import EFFORTS, Effort, plan
from mmquant.quantize.ggml.scalar.grid import FORMS
from mmquant.quantize.ggml.scalar.search import search_exponents, search_rows
from mmquant.quantize.ggml.scalar.starts import RANGE_STARTS
from mmquant.quantize.ggml.scalar.weighted import cut, empty
from mmquant.quantize.ggml.types import GGMLType

KINDS = list(FORMS)
COLUMNS = 512


def normal(seed: int, *shape: int) -> Tensor:
    """numpy's, since torch's differ from one kind of processor to the next."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def rows_of(name: str) -> Tensor:
    if name == "gaussian":
        return 0.02 * normal(0, 17, COLUMNS)
    if name == "heavy":
        gaussian = normal(1, 17, COLUMNS, 4)
        return 0.02 * gaussian[..., 0] / (gaussian[..., 1:] ** 2).mean(-1).sqrt()  # Student's t with 3 degrees
    return open_source("demo").read("model.layers.3.block_sparse_moe.experts.5.w1.weight")[:24].contiguous()


def importance_of(columns: int) -> Tensor:
    return torch.exp(1.5 * normal(2, columns))


def error(rows: Tensor, decoded: Tensor, importance: Tensor | None) -> float:
    squared = (rows - decoded).double() ** 2
    return float((squared if importance is None else importance * squared).sum())


def our_error(rows: Tensor, kind: GGMLType, importance: Tensor | None = None, effort: str = "default") -> float:
    data = codec.encode(rows, kind, importance, effort)
    return error(rows, codec.decode(data, kind, rows.shape[1]), importance)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("data", ["gaussian", "heavy", "demo"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_error_is_below_that_of_ggml(kind: GGMLType, data: str, weighted: bool) -> None:
    ggml_lib.need()
    rows = rows_of(data)
    importance = importance_of(rows.shape[1]) if weighted else None
    theirs = error(rows, ggml_lib.decode(ggml_lib.encode(rows, kind, importance), kind, rows.shape[1]), importance)
    assert our_error(rows, kind, importance) < 0.99 * theirs
    assert our_error(rows, kind, importance, "fast") < theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_ggml_accepts_the_bytes(kind: GGMLType) -> None:
    ggml_lib.need()
    rows = rows_of("heavy")
    data = codec.encode(rows, kind)
    assert ggml_lib.valid(data, kind)
    assert torch.equal(ggml_lib.decode(data, kind, COLUMNS), codec.decode(data, kind, COLUMNS))


@pytest.mark.parametrize(
    "kind, default, high",
    [
        (GGMLType.Q4_0, 1.03, 1.02),
        (GGMLType.Q5_0, 1.05, 1.03),
        (GGMLType.IQ4_NL, 1.03, 1.02),
        (GGMLType.Q8_0, 1.2, 1.15),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_steps_of_single_blocks_come_close_to_the_best_float16(kind: GGMLType, default: float, high: float) -> None:
    """Every float16 number is tried as the step: what no search can beat."""
    form = FORMS[kind]
    rows = normal(5, 40, 32) * 0.02
    importance = importance_of(32) ** 0.4  # as uneven as measured ones; more makes the best step a lottery
    levels = torch.tensor(form.levels[form.unused :], dtype=torch.float32)
    positive = torch.arange(1, 1 << 14, 3, dtype=torch.int16).view(torch.float16).float()
    smallest = rows.abs().amax() / levels.abs().max() / 2.5
    steps = positive[(positive > smallest / 4) & (positive < smallest * 12)]
    steps = torch.cat([steps, -steps])
    middles = (levels[1:] + levels[:-1]) / 2
    best = 0.0
    for row in rows:
        q = levels[torch.bucketize(row / steps[:, None], middles)]
        best += float((importance * (row - steps[:, None] * q) ** 2).sum(1).min())
    assert our_error(rows, kind, importance, "high") < high * best
    assert our_error(rows, kind, importance) < default * best


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1], ids=lambda k: k.name)
def test_what_ggml_rounds_is_hardly_searched_by_fast_without_importance(kind: GGMLType) -> None:
    ggml_lib.need()
    search, weighted = plan(kind, EFFORTS["fast"], False), plan(kind, EFFORTS["fast"])
    assert (len(search.tries), search.refits, search.rounds) == (3, 0, 0)
    assert (len(weighted.tries), weighted.refits, weighted.rounds) == (6, 1, 1)
    tiny = normal(7, 5, COLUMNS) * 2.0**-26  # hardly above the least float16
    for rows, most in ((rows_of("gaussian"), 0.92), (rows_of("heavy"), 0.98), (rows_of("demo"), 0.92), (tiny, 1)):
        theirs = error(rows, ggml_lib.decode(ggml_lib.encode(rows, kind), kind, rows.shape[1]), None)
        fast = our_error(rows, kind, None, "fast")
        assert our_error(rows, kind) <= fast <= most * theirs
    rows = rows_of("demo")
    assert codec.encode(rows, kind, torch.ones(rows.shape[1]), "fast").ne(codec.encode(rows, kind, None, "fast")).any()


@pytest.mark.parametrize("kind", list(RANGE_STARTS), ids=lambda k: k.name)
def test_starts_cut_off_the_range_where_they_say(kind: GGMLType) -> None:
    least, most, top = -3.0, 5.0, FORMS[kind].levels[-1]
    level = (most - least) / top
    search = plan(kind, EFFORTS["high"])
    for (share, below), (low, high) in zip(search.tries.tolist(), RANGE_STARTS[kind], strict=False):
        step = share * (most - least)
        start = least + below * step
        assert start == pytest.approx(least + low * level, abs=1e-5)
        assert start + top * step == pytest.approx(most - high * level, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_more_effort_is_not_worse(kind: GGMLType) -> None:
    rows, importance = rows_of("gaussian"), importance_of(COLUMNS)
    fast, default, high = (our_error(rows, kind, importance, effort) for effort in EFFORTS)
    assert high <= default * 1.0005
    assert default <= fast * 1.0005


@pytest.mark.parametrize("kind, gain", [(GGMLType.Q2_K, 0.99), (GGMLType.Q5_K, 0.975), (GGMLType.IQ4_XS, 0.996)])
def test_rounds_of_refitting_what_is_stored_pay(kind: GGMLType, gain: float) -> None:
    rows, importance = 0.02 * normal(0, 64, COLUMNS), importance_of(COLUMNS)
    errors = []
    for rounds in (0, 1, 3):
        grid, codes = search_rows(rows, kind, importance[None], Effort(supers=4, rounds=rounds))
        errors.append(error(rows, codec.values(grid, codes), importance))
    assert errors[1] < gain * errors[0]
    assert errors[2] < errors[1]


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.Q5_1], ids=lambda k: k.name)
@pytest.mark.parametrize("offset", [-1.0, 1.0])
def test_weights_on_one_side_of_zero(kind: GGMLType, offset: float) -> None:
    ggml_lib.need()
    rows = rows_of("gaussian") + offset
    theirs = error(rows, ggml_lib.decode(ggml_lib.encode(rows, kind), kind, COLUMNS), None)
    assert our_error(rows, kind) < 0.99 * theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_zero_and_dead_blocks(kind: GGMLType) -> None:
    rows = torch.zeros(3, COLUMNS)
    rows[1, 256:] = normal(6, 256)
    rows[2, 100:130] = 0.5  # constant where it is not zero
    decoded = codec.decode(codec.encode(rows, kind, importance_of(COLUMNS)), kind, COLUMNS)
    assert decoded[0].abs().max() == 0
    assert decoded[1, :256].abs().max() == 0
    assert decoded[1, 256:].abs().max() > 0
    assert error(rows[2], decoded[2], None) < 0.05 * float((rows[2] ** 2).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("exponent", [-40, -26, -16, 10])
def test_tiny_and_large_weights(kind: GGMLType, exponent: int) -> None:
    """Down to scales that are subnormal in float16, and below all of them."""
    ggml_lib.need()
    rows = normal(7, 5, COLUMNS) * 2.0**exponent
    ours = our_error(rows, kind)
    theirs = error(rows, ggml_lib.decode(ggml_lib.encode(rows, kind), kind, COLUMNS), None)
    assert ours <= theirs
    assert ours <= float((rows.double() ** 2).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_largest_weights_that_are_accepted_come_back(kind: GGMLType) -> None:
    limit = codec.largest(kind)
    rows = torch.full((1, 256), min(limit, 1e30))
    rows[0, ::2] *= -1
    decoded = codec.decode(codec.encode(rows, kind), kind, 256)
    assert decoded.isfinite().all()
    assert error(rows, decoded, None) < 0.3 * float((rows.double() ** 2).sum())
    if limit < float("inf"):
        with pytest.raises(ValueError, match=f"{kind.name}: a weight of magnitude"):
            codec.encode(rows * 1.01, kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_importance_of_groups_of_rows(kind: GGMLType) -> None:
    rows = rows_of("heavy")[:6].contiguous()
    importance = torch.stack([importance_of(COLUMNS), importance_of(COLUMNS).flip(0)])
    apart = torch.cat([codec.encode(rows[:3], kind, importance[0]), codec.encode(rows[3:], kind, importance[1])])
    assert torch.equal(codec.encode(rows, kind, importance), apart)
    assert torch.equal(codec.encode(rows, kind, importance.repeat_interleave(3, 0)), apart)
    assert torch.equal(codec.encode(rows, kind, importance * 1e-12), codec.encode(rows, kind, importance * 1e-12 * 2))


def test_exponents_are_those_of_the_tensor_form() -> None:
    rows = rows_of("heavy")
    importance = importance_of(COLUMNS) ** 3  # uneven enough that the largest weight is cut off here and there
    blocks = cut(rows, 32, importance[None])
    exponents, codes = search_exponents(blocks)
    expected, _ = mxfp4.search_blocks(blocks)
    assert float((exponents == expected).float().mean()) > 0.99
    largest = rows.view(-1, 32).abs().amax(1).frexp().exponent
    assert len((exponents.int() - largest).unique()) == 3
    assert codes.shape == blocks.x.shape


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_groups_end_inside_of_what_is_searched_side_by_side(kind: GGMLType) -> None:
    rows = rows_of("heavy")[:15, :256].contiguous()
    importance = torch.stack([importance_of(256), importance_of(256).flip(0), torch.ones(256)])
    apart = [codec.encode(part, kind, w) for part, w in zip(rows.split(5), importance, strict=True)]
    assert torch.equal(codec.encode(rows, kind, importance), torch.cat(apart))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_blocks_without_importance_are_encoded_plainly(kind: GGMLType) -> None:
    rows = rows_of("gaussian")
    plain = codec.encode(rows, kind)
    assert torch.equal(codec.encode(rows, kind, torch.zeros(COLUMNS)), plain)
    importance = importance_of(COLUMNS)
    importance[:256] = 0
    half = codec.decode(codec.encode(rows, kind, importance), kind, COLUMNS)
    assert torch.equal(half[:, :256], codec.decode(plain, kind, COLUMNS)[:, :256])


def test_threads_do_not_change_a_byte() -> None:
    rows = normal(8, 4200, 256)  # more than one chunk
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = codec.encode(rows, GGMLType.Q4_K)
        torch.set_num_threads(2)
        assert torch.equal(codec.encode(rows, GGMLType.Q4_K), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[:50], codec.encode(rows[:50], GGMLType.Q4_K))


@pytest.mark.parametrize(
    "rows, importance, message",
    [
        (torch.tensor([[float("nan")] + [0.0] * 255]), None, "hold NaN or infinity"),
        (torch.tensor([[float("inf")] + [0.0] * 255]), None, "hold NaN or infinity"),
        (torch.tensor([[-float("inf")] + [0.0] * 255]), None, "hold NaN or infinity"),
        (torch.zeros(0, 256), None, "expected at least one weight"),
        (torch.zeros(2, 255), None, "expected a multiple of 256"),
        (torch.zeros(256), None, "expected float32 rows"),
        (torch.zeros(2, 256, dtype=torch.float64), None, "expected float32 rows"),
        (torch.zeros(2, 256), torch.ones(255), "importance of shape"),
        (torch.zeros(5, 256), torch.ones(2, 256), "importance of shape"),
        (torch.zeros(2, 256), -torch.ones(256), "expected finite values >= 0"),
        (torch.zeros(2, 256), torch.full((256,), float("nan")), "expected finite values >= 0"),
    ],
)
def test_bad_input_is_refused(rows: Tensor, importance: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.encode(rows, GGMLType.Q4_K, importance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_cuda_finds_what_the_cpu_finds(kind: GGMLType) -> None:
    """Almost everywhere: where two candidates of a block are nearly equal, either may be refined to another optimum."""
    rows, importance = rows_of("heavy"), importance_of(COLUMNS)
    data = codec.encode(rows, kind, importance), codec.encode(rows.cuda(), kind, importance.cuda()).cpu()
    decoded = [codec.decode(found, kind, COLUMNS) for found in data]
    here, there = ((importance * (rows - found).double() ** 2).view(-1, 32).sum(1) for found in decoded)
    ratio = there / here
    assert float(((ratio - 1).abs() < 2e-3).double().mean()) > 0.9
    assert float(ratio.log().mean().exp()) == pytest.approx(1, abs=0.02)
    assert torch.equal(decoded[1], codec.decode(data[1].cuda(), kind, COLUMNS).cpu())


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_the_error_of_a_plan_is_what_is_claimed(kind: GGMLType) -> None:
    """Codes are the nearest ones in the grid that was found: no code may be improved on its own."""
    if kind is GGMLType.MXFP4:
        pytest.skip("has no plan")
    from mmquant.quantize.ggml.scalar import search_cpu

    rows = rows_of("heavy")
    blocks = cut(rows, kind.block_columns, None)
    search = plan(kind, EFFORTS["default"])
    found = empty(blocks, kind.block_columns // search.form.sub)
    search_cpu.search_blocks(blocks, search, found)
    grid, codes = codec.unpack(codec.encode(rows, kind), kind, COLUMNS)
    assert torch.equal(found.codes.view(codes.shape), codes)
    error_now = (rows - codec.values(grid, codes)).abs()
    for move in (-1, 1):
        other = (codes.int() + move).clamp(search.form.unused, len(search.form.levels) - 1).to(torch.uint8)
        assert ((rows - codec.values(grid, other)).abs() >= error_now * (1 - 1e-4) - 1e-9).all()
