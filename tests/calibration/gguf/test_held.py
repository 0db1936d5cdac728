"""Held-out rows: they are in no sum, they bound the correction, and they turn a bad rounding away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmquant.calibration.gguf import solve as solve_module
from mmquant.calibration.gguf.moments import Pair
from mmquant.calibration.gguf.solve import METHODS, Report, rounded_part
from mmquant.calibration.statistics.held import FEWEST, HELD, STRIDE
from mmquant.quantize.ggml.codec import decode, encode
from mmquant.quantize.ggml.types import GGMLType

N = 256


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, N, generator=torch.Generator().manual_seed(seed))


def pair_of(x: Tensor, z: Tensor, step: int = 100) -> Pair:
    pair = Pair.empty(1, N, "cpu")
    for start in range(0, len(x), step):
        pair.add(0, x[start : start + step].clone(), z[start : start + step].clone())
    return pair


def test_held_rows_are_in_no_sum_and_the_rest_in_all() -> None:
    x = rows(1000)
    pair = pair_of(x, x)
    held = torch.zeros(1000, dtype=torch.bool)
    held[STRIDE // 2 :: STRIDE] = True
    assert pair.held is not None
    assert pair.held.count[0] == int(held.sum()) == 62
    assert torch.equal(pair.held.x[0, :62], x[held])
    assert float(pair.rows[0]) == float(pair.weight[0]) == 1000 - 62
    assert torch.allclose(pair.own[0], x[~held].T @ x[~held], atol=1e-3)


def test_no_more_are_held_than_there_is_room_for_and_few_rows_keep_theirs() -> None:
    pair = pair_of(rows(16 * HELD + 500), rows(16 * HELD + 500))
    assert pair.held is not None
    assert pair.held.count[0] == HELD
    few = pair_of(rows(3), rows(3))
    assert few.held is not None
    assert (few.held.count[0], float(few.rows[0])) == (0, 3)
    assert not bool(few.held.enough(slice(None)).any())


def test_the_correction_goes_as_far_as_held_rows_say() -> None:
    """Least squares of one number: none of a wrong direction, all of the right one, half of one twice as long."""
    x, z = rows(2000), rows(2000) * 1.25
    held, weight = pair_of(x, z).held, rows(4, 3).unsqueeze(0)
    assert held is not None
    for target, share in ((weight * 0.8, 1.0), (weight * 0.6, 0.5), (weight * 1.2, 0.0)):
        known = held.agreement(slice(None), weight, target, 2)
        assert torch.allclose(held.share(slice(None), known), torch.tensor([[share, share]]), atol=1e-4)
        halves = [held.agreement(slice(None), weight[:, p], target[:, p]) for p in (slice(0, 2), slice(2, 4))]
        assert torch.allclose(torch.cat(halves, -1), known, rtol=1e-4)


def test_each_of_stacked_matrices_has_its_own_share() -> None:
    """The sums call for 0.8 W; held-out rows confirm it of the inputs of the first matrix and not of the second's."""
    x, half = rows(2000), N // 2
    z = torch.cat((1.25 * x[:, :half], x[:, half:]), 1)
    weight = rows(8, 3)
    weight[:4, half:], weight[4:, :half] = 0, 0
    pair = replace(pair_of(x, 1.25 * x), held=pair_of(x, z).held)
    method = replace(METHODS["default"], floor=0.0, sampling=0.0, damping=1e-4)
    _, values, _ = rounded_part(weight.unsqueeze(0), GGMLType.Q8_0, pair, slice(None), method, matrices=2)
    wanted = torch.cat((0.8 * weight[:4], weight[4:]))
    assert float((values[0] - wanted).norm() / wanted.norm()) < 0.02


def drifted(outputs: int, confirmed: float = 1.0) -> tuple[Pair, Tensor, Tensor]:
    """Sums over rows whose stream lacks M z; held-out rows lack `confirmed` of it. Also W and M, stacked [1, O, N]."""
    x, weight, lost = rows(2000), rows(outputs, 3), 0.5 * rows(outputs, 4)
    pair = Pair.empty(1, N, "cpu", outputs)
    for part in range(0, 2000, 100):
        z = x[part : part + 100]
        pair.add(0, z, z, d=z @ lost.T)
    assert pair.held is not None
    return replace(pair, held=replace(pair.held, d=confirmed * pair.held.d)), weight.unsqueeze(0), lost.unsqueeze(0)


@pytest.mark.parametrize("confirmed", [1.0, 0.5, 0.0])
def test_what_the_stream_lacks_is_made_good_as_far_as_held_rows_say(confirmed: float) -> None:
    """Both streams agree at the input, so all that is to add is M z: the matrix becomes W + M."""
    pair, weight, lost = drifted(8, confirmed)
    method = replace(METHODS["default"], floor=0.0, sampling=0.0, damping=1e-4)
    _, values, _ = rounded_part(weight, GGMLType.Q8_0, pair, slice(None), method)
    wanted = weight + confirmed * lost
    assert float((values - wanted).norm() / wanted.norm()) < 0.02
    _, without, _ = rounded_part(weight, GGMLType.Q8_0, pair, slice(None), replace(method, residual=False))
    assert float((without - weight).norm() / weight.norm()) < 0.02


def test_outputs_in_blocks_make_good_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, weight, _ = drifted(8)
    _, whole, _ = rounded_part(weight, GGMLType.Q8_0, pair, slice(None), METHODS["default"])
    monkeypatch.setattr(solve_module, "rows_at_once", lambda _: 3)
    _, blocks, _ = rounded_part(weight, GGMLType.Q8_0, pair, slice(None), METHODS["default"])
    assert float((whole - blocks).norm() / whole.norm()) < 0.01
    assert float((whole - weight).norm() / weight.norm()) > 0.1


def test_what_feedback_made_worse_is_rounded_plainly_and_said() -> None:
    """Moments that lie about the held-out rows: errors are fed where the rows are loud."""
    kind, weight = GGMLType.Q2_K, rows(8, 1).unsqueeze(0)
    x = rows(80 * STRIDE) @ (0.2 * torch.eye(N) + rows(N, 5) / N**0.5 @ torch.diag(torch.arange(N) < 20).float())
    pair = pair_of(x, x)
    lie = rows(3, 7).T  # three directions that the sums call loud; the rows know nothing of them
    false = replace(pair, own=(1e4 * lie @ lie.T).unsqueeze(0), cross=(1e4 * lie @ lie.T).unsqueeze(0))
    method = replace(METHODS["default"], floor=0.0, sampling=0.0, damping=1e-4, correct=False)
    data, values, plain = rounded_part(weight, kind, false, slice(None), method)
    assert plain.tolist() == [[True]]
    own, _ = method.moments(false, slice(None))
    alone = encode(weight[0], kind, own[0].diagonal().contiguous())
    assert torch.equal(data[0], alone)
    assert torch.equal(values[0], decode(alone, kind, N))
    honest = replace(METHODS["default"], correct=False)
    data, _, plain = rounded_part(weight, kind, pair, slice(None), honest)
    assert not bool(plain.any())
    unguarded, _, _ = rounded_part(weight, kind, replace(pair, held=None), slice(None), honest)
    assert torch.equal(data, unguarded)


def test_the_report_names_them() -> None:
    report = Report(plain={(1, "ffn_up_exps"): [2, 5], (1, "attn_q"): [0], (0, "attn_k"): [0], (1, "attn_v"): []})
    lines = list(report.of_layer(1))
    assert len(lines) == 2
    assert lines[0].startswith("layer 1: ffn_up_exps of experts 2, 5 rounded without error feedback")
    assert lines[1].startswith("layer 1: attn_q rounded without")
    assert FEWEST <= HELD
