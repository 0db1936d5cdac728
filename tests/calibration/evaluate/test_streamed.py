"""The streamed pass equals whole models window by window; stored references; interrupted runs continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.eval_cases import CONTEXT, Noisy, make_sample, packed, small, write_model
from mmquant.calibration.evaluate import state as evaluation_state
from mmquant.calibration.evaluate import streamed
from mmquant.calibration.evaluate.metrics import summarise
from mmquant.calibration.evaluate.reference_store import StoredReference
from mmquant.calibration.evaluate.streamed import evaluate
from mmquant.calibration.evaluate.subjects import ENERGY, ERROR, OVERLAP, TOKENS
from mmquant.calibration.model.forward import Observer, Routing, embed, final_logits, layer_forward
from mmquant.calibration.model.hidden import HiddenStates
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.open import open_native
from mmquant.convert.source import Source, read_globals, read_layer
from mmquant.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_native(write_model(tmp_path_factory.mktemp("model")))


class Chosen(Observer):
    def moe_input(self, x: Tensor, routing: Routing) -> None:
        self.sets = [set(row) for row in routing.chosen.tolist()]


def whole_model(source: Source, window: Tensor) -> tuple[Tensor, list[Tensor], list[list[set[int]]]]:
    """Logits [T, V], the hidden state after each layer and the experts chosen in it, of one window by the whole
    model.
    """
    head = read_globals(source)
    hidden = embed(head, window[None])
    states, chosen = [], []
    for layer in range(source.geometry.layers):
        watch = Chosen()
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden, watch)
        states.append(hidden[0])
        chosen.append(watch.sets)
    return final_logits(head, source.geometry, hidden)[0], states, chosen


def test_one_pass_is_the_whole_models_window_by_window(model: Checkpoint) -> None:
    candidate, sample = Noisy(model), make_sample()
    found = evaluate(model, [candidate], sample, small())[0]
    kld, error, energy, overlap = [], torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)
    for window in range(sample.windows):
        domain = int(sample.domain[window])
        (base, states, sets), (mine, states_, sets_) = (
            whole_model(m, sample.tokens[window]) for m in (model, candidate)
        )
        for position in range(int(sample.first[window]), CONTEXT - 1):
            p, q = torch.log_softmax(base[position].double(), 0), torch.log_softmax(mine[position].double(), 0)
            kld.append(float((p.exp() * (p - q)).sum()))
        for layer in range(3):
            error[layer, domain] += (states_[layer] - states[layer]).pow(2).sum()
            energy[layer, domain] += states[layer].pow(2).sum()
            pairs = zip(sets[layer], sets_[layer], strict=True)
            overlap[layer, domain] += sum(len(a & b) / len(a | b) for a, b in pairs)
    np.testing.assert_allclose(found.scores.kld, kld, rtol=1e-3, atol=1e-7)
    assert np.mean(kld) > 1e-4, "the candidate must differ for this to mean anything"
    layers = torch.stack(found.layers)
    torch.testing.assert_close(layers[:, ERROR].float(), error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layers[:, ENERGY].float(), energy, rtol=1e-4, atol=0)
    torch.testing.assert_close(layers[:, OVERLAP].float(), overlap, rtol=1e-4, atol=0)
    assert layers[:, TOKENS].sum(1).tolist() == [sample.windows * CONTEXT] * 3


def test_several_candidates_are_each_scored_alone(model: Checkpoint) -> None:
    sample = make_sample()
    near, far = Noisy(model, 0.01), Noisy(model, 0.2)
    both = evaluate(model, [near, far], sample, small())
    for candidate, together in zip((near, far), both, strict=True):
        alone = evaluate(model, [candidate], sample, small())[0]
        np.testing.assert_array_equal(alone.scores.kld, together.scores.kld)
    assert both[0].scores.kld.mean() < both[1].scores.kld.mean()


def test_the_reference_itself_has_no_distance_and_the_floor_a_small_one(model: Checkpoint) -> None:
    itself, floor = evaluate(model, [model], make_sample(), small(floor=True))
    assert itself.scores.kld.max() == 0
    assert floor.label == "noise floor"
    assert 0 < floor.scores.kld.mean() < 0.01
    assert torch.stack(itself.layers)[:, ERROR].sum() == 0


def test_hidden_states_on_disk_and_batches_do_not_change_the_result(model: Checkpoint, tmp_path: Path) -> None:
    candidate, sample = Noisy(model), make_sample()
    ram = evaluate(model, [candidate], sample, small())[0]
    disk = evaluate(model, [candidate], sample, small(ram_limit=0, folder=tmp_path))[0]
    np.testing.assert_array_equal(ram.scores.kld, disk.scores.kld)


def test_the_models_of_a_pass_share_the_memory_for_hidden_states(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[bool] = []

    def noted(*arguments: Any) -> HiddenStates:
        states = HiddenStates(*arguments)
        places.append(states.on_disk)
        return states

    monkeypatch.setattr(streamed, "HiddenStates", noted)
    sample = make_sample()
    one = 4 * sample.tokens.numel() * model.geometry.hidden  # bytes of a model's states
    for limit, on_disk in ((2 * one, False), (2 * one - 1, True)):
        evaluate(model, [Noisy(model)], sample, small(ram_limit=limit, folder=tmp_path))
        assert places == [on_disk] * 2
        places.clear()


def test_a_candidate_with_nan_weights_is_counted(model: Checkpoint) -> None:
    found = evaluate(model, [Noisy(model, float("nan"))], make_sample(), small())[0]
    assert not found.scores.finite.any()
    numbers = summarise(found.scores, make_sample().units())
    assert numbers["nonfinite"] == numbers["tokens"] == len(found.scores)


def test_another_model_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    for name, change in (("layers", {"num_hidden_layers": 2}), ("experts", {"num_local_experts": 8})):
        other = open_native(write_model(tmp_path / name, **change))
        with pytest.raises(ValueError, match=f"{name} is ., the reference has .: another model"):
            evaluate(model, [other], make_sample(), small())


def test_tokens_outside_the_vocabulary_are_refused(model: Checkpoint) -> None:
    with pytest.raises(ValueError, match="the model's vocabulary has 320"):
        evaluate(model, [model], make_sample(vocab=5000), small())


def test_a_stored_reference_gives_the_same_numbers(model: Checkpoint, tmp_path: Path) -> None:
    candidate, sample, path = Noisy(model), make_sample(), tmp_path / "reference"
    live = evaluate(model, [candidate], sample, small(), save=path)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["reference"]
    stored = evaluate(StoredReference(path), [candidate], sample, small())[0]
    np.testing.assert_allclose(stored.scores.nll, live.scores.nll, rtol=1e-6)
    np.testing.assert_allclose(stored.scores.nll_reference, live.scores.nll_reference, rtol=1e-6)
    np.testing.assert_allclose(stored.scores.kld, live.scores.kld, atol=1e-4)
    assert abs(stored.scores.kld.mean() - live.scores.kld.mean()) < 1e-5
    np.testing.assert_array_equal(stored.scores.same, live.scores.same)
    assert not stored.layers


def stopped(model: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that cannot read layer 2 and keeps its state behind every layer."""
    monkeypatch.setattr(evaluation_state, "EVERY", 0.0)
    with pytest.raises(ValueError, match="layer 2 cannot be read"):
        evaluate(model, [Noisy(model, stop_at=2)], make_sample(), small(state=folder / "state"))
    return folder / "state"


def test_a_run_that_stops_goes_on_where_it_was(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, state = make_sample(), stopped(model, tmp_path, monkeypatch)
    assert [p.name.split("-", 1)[1] for p in state.iterdir()] == ["layer002-rank0.safetensors"]
    again = Noisy(model)
    resumed = evaluate(model, [again], sample, small(state=state))[0]
    assert set(again.read_layers) == {2}
    straight = evaluate(model, [Noisy(model)], sample, small())[0]
    for name, value in packed(straight).items():
        torch.testing.assert_close(packed(resumed)[name], value, rtol=0, atol=0)
    assert not list(state.iterdir())


def test_the_state_of_another_run_is_not_taken_up(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stopped(model, tmp_path, monkeypatch)
    other = Noisy(model, 0.07)
    evaluate(model, [other], make_sample(), small(state=state))
    assert set(other.read_layers) == {0, 1, 2}


def test_a_damaged_state_is_one_line_and_stays(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stopped(model, tmp_path, monkeypatch)
    (kept,) = state.iterdir()
    data = kept.read_bytes()
    for damage in (b"", data[:100], data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"\x80\x02}q\x00." * 9):
        kept.write_bytes(damage)
        with pytest.raises(InputError, match=rf"{kept.name}: .*delete it to score from the start"):
            evaluate(model, [Noisy(model)], make_sample(), small(state=state))
        assert kept.read_bytes() == damage
