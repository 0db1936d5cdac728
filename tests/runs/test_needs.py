"""Every writer's dry run prints one table of what the run takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import mmquant
from helpers.run_cases import CALIBRATION
from mmquant import GgufOptions
from mmquant.commands.cli import cli
from mmquant.errors import FitError, InputError
from mmquant.quantize.ggml.types import GGMLType
from mmquant.runs.needs import duration, rates

WRITERS = [
    ["fp8"],
    ["fp8", "--scheme", "native"],
    ["int4", "--method", "rtn"],
    ["nvfp4", "--method", "rtn"],
    ["mxfp4", "--method", "rtn"],
    ["gguf", "--type", "Q4_K_M"],
    ["bf16"],
    ["calibrate", "--windows", "8"],
]


@pytest.mark.parametrize("line", WRITERS, ids=" ".join)
def test_a_dry_run_prints_what_the_run_takes(line: list[str], tmp_path: Path) -> None:
    out = tmp_path / "o"
    done = CliRunner().invoke(cli, [*line, "--model", "demo", "--device", "cpu", "--out", str(out), "--dry-run"])
    done = (
        done
        if done.exit_code == 0
        else CliRunner().invoke(cli, [*line, "--model", "demo", "--out", str(out), "--dry-run"])
    )
    assert done.exit_code == 0, done.output
    for word in (
        "output",
        "download",
        "disk peak",
        "RAM",
        "GPU memory",
        "passes over the source: 1",
        "time: ",
        "fits: yes",
    ):
        assert word in done.output, word
    assert not out.exists()


def test_needs_are_in_the_result(tmp_path: Path) -> None:
    plan = mmquant.quantize_gguf("demo", tmp_path / "o", GgufOptions(type="Q8_0"), device="cpu", dry_run=True)
    assert plan.needs is not None
    found = plan.to_dict()["needs"]
    assert (found["download"], found["gpu"], found["output"], found["disk"]) == (0, 0, plan.bytes, plan.bytes)
    assert found["seconds"] == pytest.approx(14.4e6 / 293.9e6, rel=0.5)
    assert "bench/RESULTS.md" in found["basis"]


def test_rates_name_types_that_there_are() -> None:
    assert {name for row in rates().values() for name in row} - {"gptq"} <= set(GGMLType.__members__)


def test_durations() -> None:
    assert [duration(s) for s in (0.5, 60, 600, 7200)] == ["0.5 s", "60 s", "10 min", "2.0 h"]


QS = ("Q8_0", "Q2_K")
MORE = {"int4": ["--method", "rtn"], "gguf": ["--type", "Q8_0"]}
MORE["calibrate"] = ["--windows", "4", "--context", "64", "--text", str(CALIBRATION)]
RECIPE = """model: demo
variants:
  q8: {command: gguf, type: Q8_0}
  q2: {command: gguf, type: Q2_K, no_calibration: true}
"""


def test_a_recipes_dry_run_is_the_same_table(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    made = mmquant.run(tmp_path / "recipe.yaml", tmp_path / "out", device="cpu", dry_run=True)
    assert made.needs is not None
    text = "\n".join(made.lines())
    for word in ("output", "download", "disk peak", "RAM", "GPU memory", "passes over the source: 1", "fits: yes"):
        assert word in text, word
    each = [mmquant.quantize_gguf("demo", tmp_path / "o", GgufOptions(type=t), dry_run=True, device="cpu") for t in QS]
    assert made.needs.output == sum(one.bytes for one in each)
    assert made.needs.seconds == pytest.approx(
        sum(one.needs.seconds for one in each if one.needs and one.needs.seconds)
    )


@pytest.mark.parametrize("name", ["calibrate", "gguf", "int4", "bf16", "run"])
@pytest.mark.parametrize("found", ["file", "stranger"])
def test_an_occupied_place_does_not_fit(name: str, found: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if found == "file":
        out.write_text("x")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("x")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    line = [str(tmp_path / "recipe.yaml")] if name == "run" else ["--model", "demo"]
    done = CliRunner().invoke(
        cli, [name, *line, "--device", "cpu", "--out", str(out), *MORE.get(name, []), "--dry-run"]
    )
    assert "fits: no" in done.output
    assert isinstance(done.exception, FitError)
    real = CliRunner().invoke(cli, [name, *line, "--device", "cpu", "--out", str(out), *MORE.get(name, [])])
    assert isinstance(real.exception, InputError), "a real run calls it bad input"
