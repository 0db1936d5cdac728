"""One pass for many artifacts: the bytes of the single commands, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmquant.convert.source as sources
from helpers.run_cases import alone, artifacts, digests, model, recipe
from mmquant.convert import manifest
from mmquant.runs import run_check
from mmquant.runs.evaluation.run import evaluate
from mmquant.runs.options_use import EvalOptions
from mmquant.runs.run import run
from mmquant.runs.status import status


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "m")


def test_artifacts_are_those_of_the_single_commands(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every layer is dequantized once."""
    read: list[int] = []
    original = sources._read_layer

    def counted(source: Any, layer: int, *rest: Any) -> Any:
        read.append(layer)
        return original(source, layer, *rest)

    monkeypatch.setattr(sources, "_read_layer", counted)
    wanted = recipe(source)
    run(wanted, tmp_path / "run", device="cpu")
    assert read == [0, 1, 2]  # the check's candidates are read from their files, the reference is at hand
    alone(wanted, tmp_path / "alone")
    assert artifacts(tmp_path / "run") == digests(tmp_path / "alone")


def test_scores_are_those_of_eval_without_its_pass(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = "\n  fp8: {command: fp8, max_shard_size: 700KB}\n  Q4_0: {command: gguf, type: Q4_0, max_part_size: 900KB}\n"
    wanted = recipe(source, few, "check: {windows: 3, context: 32, gates: {max_kld: 0.000001}}\n")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass of its own")

    with monkeypatch.context() as patch:
        patch.setattr(run_check, "evaluate", never)
        made = run(wanted, tmp_path / "run", device="cpu")
    assert made.failure is not None
    assert made.failure.startswith("Q4_0: kld.mean is ")
    paths = [tmp_path / "run" / row["path"] for row in made.rows()]
    alone = evaluate(paths, source, EvalOptions(windows=3, context=32), device="cpu")
    assert alone is not None
    for path, row, candidate in zip(paths, made.rows(), alone.document["candidates"], strict=True):
        known = manifest.read(path if path.is_dir() else path.parent)
        assert known is not None
        metrics = known["artifacts"][0]["quality"]["metrics"]
        assert {name: candidate[name] for name in metrics} == metrics
        assert row["scores"]["kld"]["mean"] == candidate["kld"]["mean"]
        assert row["bytes"] == candidate["bytes"]
    dry = run(wanted, tmp_path / "dry", device="cpu", dry_run=True)
    assert [row["bytes"] for row in dry.rows()] == [c["bytes"] for c in alone.document["candidates"]]
    assert all("weights GB" in "\n".join(found.lines()) for found in (made, dry))


def test_a_finished_run_has_all_its_steps(source: Path, tmp_path: Path) -> None:
    run(recipe(source, "\n  fp8: {command: fp8}\n"), tmp_path / "run", device="cpu")
    found = status(tmp_path / "run")
    assert (found.state, found.to_dict()["step"], found.to_dict()["steps"]) == ("finished", 5, 5)
    assert found.lines()[1].endswith(": all 3 layers done")
