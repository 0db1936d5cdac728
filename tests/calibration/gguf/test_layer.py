"""Matrices of one GGUF layer: chunks change nothing, shared sweeps, plain types."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.allocations import Allocations
from mmquant.calibration.gguf import memory as gguf_memory
from mmquant.calibration.gguf.moments import Pair
from mmquant.calibration.gguf.solve import METHODS, Method, Report, experts_at_once, rounded_part, rows_at_once, solve
from mmquant.quantize.ggml.codec import decode
from mmquant.quantize.ggml.types import GGMLType


def problem(experts: int, rows: int, n: int) -> tuple[Tensor, Pair]:
    """Weights [E, O, n] and moments of inputs that the quantized layers before have bent a little."""
    g = torch.Generator().manual_seed(0)
    pair = Pair.empty(experts, n, "cpu")
    mix = torch.randn(n, n, generator=g) / n**0.5
    for expert in range(experts):
        x = torch.randn(3 * n, n, generator=g) @ mix
        pair.add(expert, x, x + 0.1 * torch.randn(x.shape, generator=g))
    return torch.randn(experts, rows, n, generator=g) * 0.05, pair


@pytest.mark.parametrize("method", list(METHODS.values()), ids=list(METHODS))
@pytest.mark.parametrize("kind", [GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.IQ2_XXS])
def test_chunks_and_neighbours_change_nothing(kind: GGMLType, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, pair = problem(3, 6, 256)
    data, values = solve(weight, kind, pair, method)
    assert data.shape == (3, 6, kind.row_bytes(256))
    assert torch.equal(values, decode(torch.from_numpy(data).flatten(0, 1), kind, 256).view_as(weight))
    monkeypatch.setattr(gguf_memory, "CPU_WORK", 1)
    assert experts_at_once(weight) == 1
    alone, _ = solve(weight, kind, pair, method)
    assert (alone != data).any(2).sum() <= 1  # a row with a float32 tie: batched products round otherwise
    halves = [solve(weight[:, part], kind, pair, method)[0] for part in (slice(0, 3), slice(3, 6))]
    both, _, _ = rounded_part(weight, kind, pair.pooled(), slice(None), method, 2)
    assert (np.concatenate(halves, 1) != both.numpy()).any(2).sum() <= 1  # w1 and w3 in one sweep are w1 and w3


def test_a_solve_stays_within_the_working_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that live at once, counted as they are made; half of the bytes at least are put to use."""
    weight, pair = problem(5, 200, 256)
    taken = []
    for work in (9_000_000, 21_000_000):
        monkeypatch.setattr(gguf_memory, "CPU_WORK", work)
        taken.append(experts_at_once(weight))
        with Allocations() as allocations:
            data, values = solve(weight, GGMLType.Q4_K, pair, Method())
        assert work / 2 < allocations.peak <= work + data.nbytes + values.nbytes
    assert 1 <= taken[0] < taken[1] < 5
    assert experts_at_once(torch.empty(256, 3072, 3072, device="meta")) == 1


def test_a_matrix_larger_than_the_memory_is_solved_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, pair = problem(1, 600, 256)
    data, values = solve(weight, GGMLType.Q4_K, pair, Method())
    monkeypatch.setattr(gguf_memory, "CPU_WORK", 1)
    assert rows_at_once(weight) == 256
    blocks, also = solve(weight, GGMLType.Q4_K, pair, Method())
    assert blocks.shape == data.shape
    assert (blocks != data).mean() < 0.01
    assert (also - values).abs().mean() < 0.01 * values.abs().mean()
    monkeypatch.setattr(gguf_memory, "CPU_WORK", 4 * 256 * (11 * 500 + 8 * 256))
    assert rows_at_once(weight) == 500


def test_two_matrices_larger_than_the_memory_are_solved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """gate and up of an expert, as those of M2.7 on a CPU: each with its own share of the correction."""
    weight, pair = problem(1, 600, 256)
    pair = replace(pair, drift=0.3 * weight.flip(1) * pair.weight.view(-1, 1, 1))  # another of each output
    part, method = slice(0, 1), METHODS["default"]
    assert pair.held is not None
    together = rounded_part(weight, GGMLType.Q4_K, pair, part, method, 2)
    monkeypatch.setattr(gguf_memory, "CPU_WORK", 4 * 256 * (11 * 400 + 8 * 256))
    assert rows_at_once(weight) == 400
    apart = rounded_part(weight, GGMLType.Q4_K, pair, part, method, 2)
    assert [found.shape for found in apart] == [found.shape for found in together]
    assert apart[2].shape == (1, 2)
    assert (apart[0] != together[0]).float().mean() < 0.01
    for number, rows in enumerate((slice(0, 300), slice(300, 600))):
        alone = rounded_part(weight[:, rows], GGMLType.Q4_K, pair.outputs(rows), part, method)
        assert torch.equal(apart[0][:, rows], alone[0])
        assert torch.equal(apart[1][:, rows], alone[1])
        assert torch.equal(apart[2][:, number], alone[2][:, 0])


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.BF16])
def test_plain_types_are_stored_as_they_are(kind: GGMLType) -> None:
    weight, pair = problem(2, 3, 256)
    data, values = solve(weight.bfloat16(), kind, pair, Method())
    assert torch.equal(values, weight.bfloat16())
    assert torch.equal(
        decode(torch.from_numpy(data).flatten(0, 1), kind, 256).view_as(weight), weight.bfloat16().float()
    )


def test_what_the_user_should_know() -> None:
    report = Report(rescaled={(3, 11): 4, (3, 3): 5, (1, 0): 2}, unseen={(3, 7)})
    assert list(report.of_layer(0)) == []
    assert list(report.of_layer(3)) == [
        "layer 3: experts 3 (2^5), 11 (2^4) rescaled, their sums would overflow float16 on CUDA",
        "layer 3: experts 7 saw no token, the layer's pooled moments stand in",
    ]
