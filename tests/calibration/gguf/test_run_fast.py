"""--effort fast uses what `calibrate` collects, one stream, and continues an interrupted run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from helpers.calibration_cases import corpus, options
from helpers.tiny import write_tiny
from mmquant.calibration.gguf import run_fast as gguf_fast
from mmquant.calibration.gguf.run_fast import FastRun
from mmquant.calibration.gguf.run_stored import StoredRun, open_stored
from mmquant.calibration.model.forward import embed, layer_forward, rms_norm
from mmquant.calibration.statistics.collect import Collect
from mmquant.calibration.statistics.run import calibrate_into
from mmquant.convert.checkpoints.checkpoint import Checkpoint
from mmquant.convert.gguf.mixes import find_mix
from mmquant.convert.gguf.plan import GgufPlan, plan_steps
from mmquant.convert.gguf.variant import GgufVariant
from mmquant.convert.open import open_native
from mmquant.convert.source import read_globals, read_layer
from mmquant.quantize.ggml.codec import encode
from mmquant.quantize.ggml.types import GGMLType

Made = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_local_experts": 3}
    return open_native(write_tiny(tmp_path_factory.mktemp("model"), vocab_size=96, num_attention_heads=8, **sizes))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return corpus(30, 40).tokens


def plan_of(source: Checkpoint) -> GgufPlan:
    return GgufPlan("m", plan_steps(GgufVariant(find_mix("Q3_K_S"), "m", True), source.geometry), ())


def make(source: Checkpoint, tokens: Tensor, folder: Path, steps: range) -> Made:
    run, out = FastRun(source, plan_of(source), tokens, "cpu", folder), {}
    run.begin(steps.start)
    for step in steps:
        out |= dict(run.tensors(step))
        run.save(step + 1)
        run.forget(step)
    return out


@pytest.fixture(scope="module")
def whole(source: Checkpoint, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(source, tokens, tmp_path_factory.mktemp("whole"), range(5))


def test_layers_are_those_of_calibrates_diagonals(source: Checkpoint, whole: Made, tmp_path: Path) -> None:
    settings = options(collect=Collect(full=False), batch=30)
    assert len(list(calibrate_into(source, corpus(30, 40), tmp_path / "s", settings))) == 3
    stored = open_stored(tmp_path / "s", source, "fast")
    run = StoredRun(source, plan_of(source), stored, "cpu")
    for step in range(1, 4):
        for name, data in run.tensors(step):
            assert (data != whole[name]).mean() < 0.001, name  # batches add in another order


def test_the_head_is_weighed_by_what_it_sees(source: Checkpoint, tokens: Tensor, whole: Made) -> None:
    outside = read_globals(source)
    hidden = embed(outside, tokens)
    for layer in range(source.geometry.layers):
        hidden = layer_forward(read_layer(source, layer), source.geometry, hidden)
    importance = rms_norm(hidden, outside.norm, source.geometry.norm_eps).square().mean((0, 1))
    kind = next(GGMLType[info.type] for info in plan_of(source).steps[-1] if info.name == "output.weight")
    expected = encode(outside.head, kind, importance).numpy()
    assert (whole["output.weight"] != expected).mean() < 0.001
    assert (whole["output.weight"] != encode(outside.head, kind).numpy()).mean() > 0.05


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("done", [2, 4])
def test_a_run_goes_on_where_it_ended(
    source: Checkpoint,
    tokens: Tensor,
    whole: Made,
    tmp_path: Path,
    done: int,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(source, tokens, tmp_path, range(done))
    if not kept:
        for path in tmp_path.glob(".hidden-*"):
            path.unlink(missing_ok=True)  # one may be on its way out
    read: list[int] = []
    before = gguf_fast.Stream.read_layer
    monkeypatch.setattr(gguf_fast.Stream, "read_layer", lambda self, layer: read.append(layer) or before(self, layer))
    rest = make(source, tokens, tmp_path, range(done, 5))
    assert read == list(range(done - 1 if kept else 0, 3))  # replayed from the start without the stream's file
    assert all(np.array_equal(data, whole[name]) for name, data in rest.items())
