"""`mmquant int4` and `awq`: contradicting options end in one line before any work; --dry-run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmquant.commands.cli import cli
from mmquant.convert.open import open_native
from mmquant.errors import InputError
from mmquant.runs.artifacts import WEIGHTS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "gptq", "--asymmetric"], "engines read symmetric gptq only"),
        (["--format", "awq", "--attention", "fp8"], "only compressed-tensors holds FP8"),
        (["--method", "rtn", "--effort", "high"], "--effort high --method rtn: rounding to nearest is not refined"),
        (["--method", "rtn", "--statistics", "x"], "--method rtn --statistics: round to nearest uses no statistics"),
        (["--method", "rtn", "--text", "x"], "--text has no effect with --method rtn"),
        (["--statistics", "x", "--windows", "4"], "--windows has no effect with --statistics"),
        (["--kv-cache", "fp8", "--method", "rtn"], "the scales are calibrated, expected gptq or awq"),
        (["--kv-cache", "fp8", "--format", "gptq"], "expected compressed-tensors"),
        (["--eight-bit", "0-b"], "expected layers such as 0,60-61"),
        (["--eight-bit", "0-99999999999"], "expected layers such as 0,60-61"),
        (["--eight-bit", "3-1"], "3-1 runs backwards"),
        (["--tp", "8"], "256/8 = 32 is not a multiple"),
        (["--group-size", "64", "--eight-bit", "9"], "the model has layers 0 to 3"),
        (["--effort", "high", "--statistics", "nowhere"], "needs the calibration tokens"),
        (["--statistics", "nowhere"], "nowhere"),
    ],
)
def test_one_line_for_bad_input(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["int4", "--model", "demo", "--out", str(tmp_path / "o"), *arguments])
    assert isinstance(result.exception, (InputError, ValueError)), result.output
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize("command", [["int4"], ["awq"], ["int4", "--method", "rtn", "--format", "gptq"]])
def test_dry_run_writes_nothing(tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "o"
    result = CliRunner().invoke(cli, [*command, "--model", "demo", "--out", str(out), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "bytes into" in result.output
    assert not out.exists()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_seed_reaches_the_solver(kind: Any) -> None:
    _, make = WEIGHTS[kind]
    assert make(open_native("demo"), kind(seed=5), Path("never")).options.seed == 5  # type: ignore[union-attr]


def test_fast_takes_diagonal_statistics_and_says_so_when_more_is_needed(tmp_path: Path) -> None:
    run, statistics, text = CliRunner(), str(tmp_path / "s"), tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 600)
    few = ["--text", str(text), "--windows", "4", "--context", "64"]
    assert not run.invoke(
        cli, ["calibrate", "--model", "demo", "--moments", "diagonal", *few, "--out", statistics]
    ).exception
    common = ["int4", "--model", "demo", "--statistics", statistics]
    result = run.invoke(cli, [*common, "--out", str(tmp_path / "o")])
    assert "holds diagonals, expected second moments" in str(result.exception)
    result = run.invoke(cli, [*common, "--effort", "fast", "--out", str(tmp_path / "f")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "f" / "config.json").is_file()


def test_awq_offers_what_its_format_holds_and_says_what_effort_does_there() -> None:
    run = CliRunner()
    said = " ".join(run.invoke(cli, ["awq", "--help"]).output.split())
    assert "--effort [default|high] high adds error feedback to AWQ's scales." in said
    assert "--attention [bf16|int4]" in said
    assert "gptq:" not in said
    for option in ("--asymmetric", "--eight-bit", "--kv-cache", "--plan"):
        assert option not in said
    assert "--asymmetric" in run.invoke(cli, ["int4", "--help"]).output  # int4's own parameters are untouched
    assert "[fast|default|high]" in run.invoke(cli, ["int4", "--help"]).output
