"""Floors change nothing but the order of sums and of windows."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.eval_cases import make_sample, small, write_model
from mmquant.calibration.evaluate.floors import ShuffledSums, window_order
from mmquant.calibration.evaluate.streamed import evaluate
from mmquant.calibration.model.forward import layer_forward
from mmquant.convert.open import open_native
from mmquant.convert.source import read_layer


def test_sums_in_another_order_are_the_same_sums(tmp_path: Path) -> None:
    source = open_native(write_model(tmp_path))
    weights = read_layer(source, 0)
    hidden = torch.randn(2, 12, source.geometry.hidden, generator=torch.Generator().manual_seed(1))
    wanted = layer_forward(weights, source.geometry, hidden)
    for seed in (1, 2):
        sums = ShuffledSums(seed)
        found = layer_forward(sums.weights(source, 0, weights), source.geometry, hidden, None, sums.layer(source, 0))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.equal(found, wanted)
        assert not torch.equal(sums.weights(source, 0, weights).q, weights.q)


def test_floors_beside_the_candidates(tmp_path: Path) -> None:
    source = open_native(write_model(tmp_path))
    sample = make_sample()
    assert sorted(window_order(7, 1).tolist()) == list(range(7)) != window_order(7, 1).tolist()
    found = evaluate(source, [source], sample, small(floor=True, floor_seeds=2, floor_orders=1))
    assert [(outcome.kind.split(",")[0], outcome.of) for outcome in found] == [
        ("exact", 0),
        ("floor: bfloat16", -1),
        ("floor: order of sums", -1),
        ("floor: order of sums", -1),
        ("floor: order and size of batches", -1),
    ]
    exact, low, first, second, batches = found
    assert exact.scores.kld.max() == 0
    for floor in (first, second, batches):
        # the same positions in the same order, and nearly the same numbers
        assert abs(floor.scores.nll - exact.scores.nll).max() < 1e-2
        assert floor.scores.kld.mean() < low.scores.kld.mean()
        torch.testing.assert_close(torch.stack(floor.layers)[:, 3], torch.stack(exact.layers)[:, 3])
