"""Codebook types: layouts against gguf-py and ggml, search against brute force, errors against ggml's."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import ggml_lib
from mmquant.quantize.ggml import codec
from mmquant.quantize.ggml.codebook import encode as iquants
from mmquant.quantize.ggml.codebook import search as iquants_search
from mmquant.quantize.ggml.codebook import search_cpu as iquants_numba
from mmquant.quantize.ggml.codebook import sweep_cpu as iquants_sweep
from mmquant.quantize.ggml.codebook.encode_cpu import half
from mmquant.quantize.ggml.codebook.halves import book
from mmquant.quantize.ggml.codebook.layout import LAYOUTS, Layout, Signs, field_values, pack_fields, unpack_fields
from mmquant.quantize.ggml.codebook.tables import points, with_parity
from mmquant.quantize.ggml.types import GGMLType

KINDS = [GGMLType[name] for name in LAYOUTS]
# The most that our weighted error may be of ggml's, on any of the inputs below (seen: 1 to 3 % less than this).
RATIOS = {"IQ3_S": 0.92, "IQ3_XXS": 0.96, "IQ2_S": 0.94, "IQ2_XS": 0.93, "IQ2_XXS": 0.93, "IQ1_M": 0.87, "IQ1_S": 0.87}
QUICK = [GGMLType.IQ3_S, GGMLType.IQ3_XXS, GGMLType.IQ2_XXS]  # ggml needs seconds to set up the others


def random_bytes(layout: Layout, count: int) -> Tensor:
    """Super-blocks with every bit random, except that the fp16 scale is finite."""
    data = torch.randint(0, 256, (count, layout.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if layout.name == "IQ1_M":  # its scale is in four nibbles, the exponent's high bits in the last
        data[:, 55] &= 0xBF
    else:
        data[:, 1] &= 0xBF
    return data


def scale_range(kind: GGMLType) -> float:
    """A scale at which standard normal values use the whole codebook."""
    return 2.5 / float(points(kind.name).max())


def blocks(layout: Layout, count: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, layout.shared, generator=generator)
    weight = torch.rand(count, layout.shared, generator=generator) + 0.01
    scales = scale_range(GGMLType[layout.name]) * (torch.rand(count, steps, generator=generator) + 0.05)
    return x, weight, scales


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_layout_are_those_of_gguf_and_ggml(kind: GGMLType) -> None:
    layout = LAYOUTS[kind.name]
    data = random_bytes(layout, 200)
    ours = field_values(unpack_fields(data, layout), layout)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(int(kind)))
    assert np.array_equal(ours.numpy(), theirs)
    assert torch.equal(pack_fields(unpack_fields(data, layout), layout), data)
    ggml_lib.need()
    assert torch.equal(ours, ggml_lib.decode(data, kind, 256))


def test_parity_completes_seven_signs() -> None:
    signs = with_parity(torch.arange(128, dtype=torch.uint8))
    assert all(bin(int(s)).count("1") % 2 == 0 and int(s) & 127 == i for i, s in enumerate(signs))


def brute(x: np.ndarray, weight: np.ndarray, scale: float, layout: Layout, table: np.ndarray) -> float:
    """Least weighted error of one block at one scale: every point, every allowed pattern of signs or deltas."""
    table = table.astype(np.float64)
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if layout.signs is Signs.DELTA:
        by_delta = np.array(
            [
                [(weight[g] * (x[g] - scale * (table + d)) ** 2).sum(1).min() for d in (0.125, -0.125)]
                for g in np.arange(layout.shared).reshape(-1, 8)
            ]
        )
        return float(by_delta.sum(0).min() if layout.name == "IQ1_S" else by_delta.min(1).sum())
    total = 0.0
    for octet in np.arange(layout.shared).reshape(-1, 8):
        best = np.inf
        for signs in itertools.product((1, -1), repeat=8):
            if layout.signs is Signs.PARITY and np.prod(signs) < 0:
                continue
            error = weight[octet] * (x[octet] - scale * np.array(signs) * _stacked(table, layout)) ** 2
            if layout.group == 8:
                best = min(best, error.sum(-1).min())
            else:
                best = min(best, error[..., :4].sum(-1).min() + error[..., 4:].sum(-1).min())
        total += best
    return total


def _stacked(table: np.ndarray, layout: Layout) -> np.ndarray:
    return table if layout.group == 8 else np.concatenate((table, table), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_the_true_nearest_point(kind: GGMLType) -> None:
    layout = LAYOUTS[kind.name]
    x, weight, scales = blocks(layout, 2, 2)
    x[1, 3] = 0.0
    energy = (weight * x**2).sum(1, keepdim=True)
    found = iquants_search.scan(x, weight, scales, layout) + energy
    for b, k in itertools.product(range(2), range(2)):
        expected = brute(x[b].numpy(), weight[b].numpy(), float(scales[b, k]), layout, points(kind.name))
        assert float(found[b, k]) == pytest.approx(expected, rel=2e-5)
    choice = iquants_search.choose(x, weight, scales, layout)
    assert torch.equal(choice.index, found.argmin(1))
    assert torch.allclose(chosen_error(x, weight, scales, choice, layout), found.amin(1), rtol=2e-5)


def chosen_error(
    x: Tensor, weight: Tensor, scales: Tensor, choice: iquants_search.Choice, layout: Layout, delta: float = 0.125
) -> Tensor:
    """Error [B] of what `choose` returned, from its codes and signs alone."""
    unit = torch.from_numpy(points(layout.name))[choice.code.long()].reshape(x.shape)
    minus = ((choice.signs.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1)[..., : x.shape[1]]
    if layout.signs is Signs.PARITY:
        assert bool((minus.sum(-1) % 2 == 0).all())
    unit = unit * (1 - 2 * minus.reshape(x.shape).float())
    if layout.signs is Signs.DELTA:
        unit = unit + torch.where(choice.minus, -delta, delta).repeat_interleave(8, 1)
    scale = scales.gather(1, choice.index.unsqueeze(1))
    return (weight * (x - scale * unit) ** 2).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_torch_search_agrees(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[kind.name]
    x, weight, scales = blocks(layout, 37, 5)
    monkeypatch.setattr(iquants_search, "CHUNK", 1 << 16)  # several pieces
    first = iquants_search.scan_torch(x, weight, scales, layout)
    assert torch.allclose(first, iquants_search.scan(x, weight, scales, layout), rtol=1e-5, atol=1e-5)
    ours, theirs = (f(x, weight, scales, layout) for f in (iquants_search.choose, iquants_search.choose_torch))
    assert torch.allclose(
        chosen_error(x, weight, scales, ours, layout), chosen_error(x, weight, scales, theirs, layout), rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 15, 16, 33])
def test_any_number_of_blocks_of_few_points(kind: GGMLType, count: int) -> None:
    """Sixteen blocks fill the lanes of vectors; error feedback asks for a point at a time, or two that share signs."""
    layout = LAYOUTS[kind.name]
    width = layout.group if layout.signs is Signs.FREE else 8
    for delta in (0.125, 0.0) if layout.signs is Signs.DELTA else (0.125,):
        x, weight, scales = blocks(layout, count, 3)
        x, weight = x[:, :width].contiguous(), weight[:, :width].contiguous()
        x[0, 2], weight[-1, :3], scales[count // 2] = 0, 0, 0
        search = (iquants_search.choose, iquants_search.choose_torch)
        choices = [f(x, weight, scales, layout, delta) for f in search]
        errors = [chosen_error(x, weight, scales, c, layout, delta) for c in choices]
        assert torch.allclose(errors[0], errors[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_halves_make_the_points(name: str) -> None:
    halves = book(name)
    assert sorted(halves.code) == list(range(len(points(name))))
    first = np.repeat(np.arange(len(halves.outer)), np.diff(halves.start.astype(int)))
    parts = np.concatenate((halves.outer[first], halves.inner[halves.mate]), 1)
    assert np.array_equal(halves.parts[parts].reshape(halves.points.shape), points(name)[halves.code])
    assert np.array_equal(halves.ends[:, : len(halves.code)].T, points(name)[halves.code, points(name).shape[1] // 2 :])


@pytest.mark.parametrize("kind", [GGMLType.IQ1_S, GGMLType.IQ1_M, GGMLType.IQ2_S, GGMLType.IQ3_S])
def test_guessed_errors_are_those_of_all_vectors_of_levels(kind: GGMLType) -> None:
    layout = LAYOUTS[kind.name]
    rule, halves, delta = iquants_search.numba_rule(layout), book(kind.name), np.float32(0)
    if layout.signs is Signs.DELTA:
        delta = np.float32(0.125)
    x, weight, scales = (t.numpy() for t in blocks(layout, 16, 2))
    a, w, odd, least, _, errors, second = iquants_numba.scratch(layout.shared, layout.group, rule, 2)
    iquants_numba.lay(x, weight, rule, a, w, odd)
    iquants_sweep.loose(a, w, np.ascontiguousarray(scales.T), halves, delta, least)
    iquants_sweep.settle(least, odd, rule, errors, second)
    every = np.array(list(itertools.product(halves.levels, repeat=layout.group)))
    for b, k in ((3, 0), (12, 1)):
        expected = brute(x[b], weight[b], float(scales[b, k]), layout, every)
        assert errors[k, b] + (weight[b] * x[b] ** 2).sum() == pytest.approx(expected, rel=2e-5)


def inputs(columns: int = 512, rows: int = 24) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Rows and importance: Gaussian, heavy-tailed, and with columns that count far more than others."""
    rng = np.random.default_rng(5)
    normal = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32)) * 0.02
    heavy = torch.from_numpy(rng.standard_t(3, (rows, columns)).astype(np.float32)) * 0.02
    importance = torch.from_numpy(np.exp(rng.standard_normal(columns)).astype(np.float32))
    return {
        "normal": (normal, None),
        "heavy": (heavy, None),
        "normal, importance": (normal, importance),
        "heavy, importance": (heavy, importance),
    }


def weighted_error(rows: Tensor, data: Tensor, kind: GGMLType, importance: Tensor | None) -> float:
    weight = torch.ones(rows.shape[1]) if importance is None else importance
    decoded = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(int(kind))))
    return float((weight * (rows - decoded) ** 2).sum())


def compare(kind: GGMLType, rows: Tensor, importance: Tensor | None) -> float:
    """Our weighted error over that of ggml_quantize_chunk."""
    ours = weighted_error(rows, codec.encode(rows, kind, importance), kind, importance)
    needed = kind in (GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S)
    given_ = torch.ones(rows.shape[1]) if importance is None and needed else importance
    return ours / weighted_error(rows, ggml_lib.encode(rows, kind, given_), kind, importance)


@pytest.mark.parametrize("kind", QUICK)
def test_the_error_is_below_ggml(kind: GGMLType) -> None:
    ggml_lib.need()
    for name, (rows, importance) in inputs().items():
        assert compare(kind, rows, importance) < RATIOS[kind.name], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in QUICK])
def test_the_error_is_below_ggml_for_all_types(kind: GGMLType) -> None:
    ggml_lib.need()
    for name, (rows, importance) in inputs(rows=64).items():
        assert compare(kind, rows, importance) < RATIOS[kind.name], name


@pytest.mark.parametrize("kind", QUICK)
def test_the_error_is_below_ggml_on_trained_weights(kind: GGMLType) -> None:
    ggml_lib.need()
    rows = trained()
    importance = (rows**2).mean(0) + 0.1 * (rows**2).mean()
    for given_ in (None, importance):
        assert compare(kind, rows, given_) < RATIOS[kind.name]


def trained() -> Tensor:
    from mmquant.convert.open import open_source

    source = open_source("demo")
    return source.read("model.layers.1.block_sparse_moe.experts.2.w1.weight")[:48]


@pytest.mark.parametrize("kind", KINDS)
def test_more_search_is_never_worse_by_much(kind: GGMLType) -> None:
    rows, importance = inputs(256, 96)["heavy, importance"]
    errors = [
        weighted_error(rows, iquants.encode_codebook(rows, kind, importance, iquants.EFFORTS[e]), kind, importance)
        for e in ("fast", "default", "high")
    ]
    assert errors[1] < errors[0] * 1.001
    assert errors[2] < errors[1] * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_of_the_cpu_does_what_the_tensor_form_does(kind: GGMLType) -> None:
    layout = LAYOUTS[kind.name]
    rows, importance = inputs(256, 16)["heavy, importance"]
    assert importance is not None
    rows[3] = 0
    blocks = iquants.scaled(rows, importance.expand_as(rows))
    for effort in iquants.EFFORTS.values():
        ours, theirs = (f(blocks, layout, effort) for f in (iquants.search_fields, iquants.search_tensors))
        errors = [float((blocks.weight * (rows - field_values(f, layout)) ** 2).sum()) for f in (ours, theirs)]
        if layout.signs is Signs.DELTA and effort is not iquants.EFFORTS["high"]:  # scales are guessed
            assert errors[0] < 1.02 * errors[1]
            continue
        assert errors[0] == pytest.approx(errors[1], rel=1e-3)
        assert float((ours.code == theirs.code).float().mean()) > 0.97


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 65504, width=32) | st.floats(0, 2.0**-13, width=32))
def test_half_is_rounded_as_by_torch(value: float) -> None:
    assert half(value) == float(torch.tensor(value).half())


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_rows(kind: GGMLType) -> None:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(6, 512, generator=generator)
    rows[0] = 0
    rows[1, :256] = 0
    rows[2] *= 1e-30  # below the smallest fp16 scale: nothing is left, but nothing breaks
    rows[3] *= 3e4
    rows[4, 1:] = 0
    rows[5] = rows[5].abs() * 1e-3
    importance = torch.rand(512, generator=generator)
    importance[256:] = 0
    for given_ in (None, importance):
        data = codec.encode(rows, kind, given_)
        decoded = codec.decode(data, kind, 512)
        assert bool(torch.isfinite(decoded).all())
        assert bool((decoded[0] == 0).all())
        assert bool((decoded[1, :256] == 0).all())
        assert float((decoded[3] - rows[3]).square().sum()) < 0.45 * float(rows[3].square().sum())
        if ggml_lib.llamacpp.available():
            assert ggml_lib.valid(data, kind)


def test_one_row_is_encoded_as_among_many() -> None:
    rows, importance = inputs(768, 5)["heavy, importance"]
    for kind in QUICK:
        whole = iquants.encode_codebook(rows, kind, importance)
        assert torch.equal(whole[3:4], iquants.encode_codebook(rows[3:4], kind, importance))
    assert iquants.encode_codebook(rows[:0], GGMLType.IQ3_S).shape == (0, 330)


@settings(max_examples=12, deadline=None)
@given(exponent=st.integers(-5, 3), kind=st.sampled_from(QUICK))
def test_powers_of_two_change_the_scale_alone(exponent: int, kind: GGMLType) -> None:
    rows, importance = inputs(256, 4)["normal, importance"]
    factor = 2.0**exponent
    data = iquants.encode_codebook(rows * 50 * factor, kind, importance)
    plain = iquants.encode_codebook(rows * 50, kind, importance)
    assert torch.equal(data[:, 2:], plain[:, 2:])
    assert torch.equal(codec.decode(data, kind, 256), codec.decode(plain, kind, 256) * factor)


@pytest.mark.parametrize(
    ("rows", "importance", "message"),
    [
        (torch.full((2, 256), float("nan")), None, "NaN or infinity"),
        (torch.full((2, 256), float("inf")), None, "NaN or infinity"),
        (torch.full((2, 256), 1e30), None, "the float16 scale reaches"),
        (torch.zeros(2, 250), None, "multiple of 256"),
        (torch.zeros(2, 256), torch.ones(255), "importance"),
        (torch.zeros(2, 256), -torch.ones(256), "expected finite values >= 0"),
        (torch.zeros(2, 256), torch.full((256,), float("nan")), "expected finite values >= 0"),
    ],
)
def test_bad_input_is_refused(rows: Tensor, importance: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iquants.encode_codebook(rows, GGMLType.IQ3_S, importance)
    with pytest.raises(ValueError, match="no vector-codebook type"):
        iquants.encode_codebook(torch.zeros(1, 256), GGMLType.Q4_K)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_agrees_with_the_cpu(kind: GGMLType) -> None:
    """IQ1 at high effort: below it a CPU guesses scales, for up to 0.4 % more error."""
    effort = iquants.EFFORTS["high" if kind.name.startswith("IQ1") else "default"]
    rows, importance = inputs(512, 64)["heavy, importance"]
    ours = weighted_error(rows, iquants.encode_codebook(rows, kind, importance, effort), kind, importance)
    there = importance.cuda() if importance is not None else None
    data = iquants.encode_codebook(rows.cuda(), kind, there, effort).cpu()
    assert weighted_error(rows, data, kind, importance) == pytest.approx(ours, rel=1e-3)
