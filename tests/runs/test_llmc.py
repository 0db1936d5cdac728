"""--backend llmcompressor refuses in one line what it cannot do; tests/peers tests the work itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from helpers import command
from mmquant.convert.open import open_native
from mmquant.errors import InputError, MmquantError
from mmquant.runs.llmc import FP8, PYTHON, find_python, fp8_job, write_with_llmcompressor


def mmquant(*arguments: str, python: str) -> tuple[int, str]:
    line = [*arguments, "--model", "demo", "--backend", "llmcompressor"]
    done = command.mmquant(*line, env={**os.environ, PYTHON: python})
    return done.returncode, done.stderr


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
def test_a_missing_llmcompressor_is_one_line(tmp_path: Path, python: str) -> None:
    code, words = mmquant("int4", "--method", "rtn", "--out", str(tmp_path / "o"), python=python)
    assert code == 2
    assert words.count("\n") == 1
    assert python in words
    assert PYTHON in words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["int4"], "--method gptq: expected rtn"),
        (["int4", "--method", "rtn", "--format", "awq"], "--format awq: expected compressed-tensors"),
        (["int4", "--method", "rtn", "--attention", "fp8"], "--attention fp8: expected bf16 or int4"),
        (["int4", "--method", "rtn", "--eight-bit", "0"], "expected no --eight-bit"),
        (["fp8", "--scheme", "native"], "--scheme native: expected block or channel"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, found = mmquant(*arguments, "--out", str(tmp_path / "o"), python=sys.executable)
    assert code == 2
    assert words in found
    assert found.count("\n") == 1


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that has a package of that name, but not the function."""
    (tmp_path / "llmcompressor.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv(PYTHON, raising=False)
    assert find_python() == sys.executable
    out = tmp_path / "out"
    with pytest.raises(MmquantError, match=r"llm-compressor failed \(exit 1\): ImportError"):
        write_with_llmcompressor(open_native("demo"), fp8_job("block"), out, "cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["llmcompressor.py"]
    assert set(FP8) == {"block", "channel"}
    out.mkdir()
    (out / "x").write_text("")
    with pytest.raises(InputError, match="holds x, expected an empty folder"):
        write_with_llmcompressor(open_native("demo"), fp8_job("block"), out, "cpu")
