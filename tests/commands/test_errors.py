"""A user's mistake gives one line and its exit code; a fault of mmquant gives a traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import mmquant.commands.cli as cli
import mmquant.convert.open as opened
from helpers.command import afresh, program
from helpers.entry import run
from helpers.killed import command_killed_at
from helpers.paths import ROOT
from helpers.run_cases import CALIBRATION
from helpers.tiny import write_tiny

FEW = ("--windows", "2", "--context", "32", "--text", str(CALIBRATION))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "m")


def test_the_bare_command_prints_its_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(monkeypatch, capsys)
    assert code == 2
    assert errors.startswith("Usage: mmquant [OPTIONS] COMMAND")
    assert re.search(r"\n  gguf +GGUF for llama.cpp\.\n", errors)


IDLE = {
    (
        "--method",
        "awq",
        "--effort",
        "fast",
    ): "--effort fast --method awq: it has no faster way, expected default or high",
    ("--method", "rtn", "--effort", "fast"): "--effort fast --method rtn: rounding to nearest is not refined",
    ("--statistics", "s", "--seed", "1"): "--seed has no effect with --statistics",
    ("--statistics", "s", "--propagate", "quantized"): "--propagate quantized needs the calibration tokens",
    ("--statistics", "s", "--effort", "high", "--dry-run"): "--effort high needs the calibration tokens",
    ("--text-only",): "--text-only has no effect without --text",
    (
        "--size",
        "5MB",
        "--sensitivity",
        "s",
        "--judged-windows",
        "1",
    ): "--judged-windows has no effect with --sensitivity",
    (
        "--size",
        "5MB",
        "--sensitivity",
        "s",
        "--method",
        "rtn",
        "--windows",
        "2",
    ): "--windows has no effect with --method",
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ggfu"], "no command 'ggfu'; did you mean gguf?"),
        (["frobnicate"], "no command 'frobnicate'; expected one of fp8, bf16, int4"),
        (["gguf", "--out", "x", "--type", "Q4KM"], "--type Q4KM: unknown, did you mean Q4_K_M?"),
        (["gguf", "--out", "x", "--type", "iq3xxs"], "--type iq3xxs: unknown, did you mean IQ3_XXS?"),
        (["gguf", "--out", "x", "--type", "Q8_0", "--text", "t"], "--text has no effect with --type Q8_0"),
        (["gguf", "--out", "x", "--no-calibration", "--windows", "8"], "--windows has no effect with --no-calibration"),
        (["gguf", "--out", "x", "--statistics", "s", "--seed", "1"], "--seed has no effect with --statistics"),
        (["fp8", "--out", "x", "--scheme", "native", "--max-shard-size", "1GB"], "--max-shard-size has no effect"),
        (["int4", "--out", "x", "--backend", "llmcompressor", "--text", "t"], "--text has no effect with --backend"),
        (["awq", "--out", "x", "--backend", "mmquant"], "No such option '--backend'"),
        (["calibrate", "--out", "x", "--layers", "0:\u00b2"], "expected 0:B"),
        (["calibrate", "--out", "x", "--seed", str(2**64)], "--seed"),
        (["eval", "x", "--reference", "demo", "--seed", "-1"], "--seed"),
        (["eval", "x", "--reference", "demo", "--max-kld", "nan"], "max_kld is nan, expected a number"),
        (["gguf", "--out", "x", "--model", "demo", "--plan", "nowhere.json"], "--plan nowhere.json: no such file"),
        (["gguf", "--out", "x", "--tensor-type", "head=Q4K"], "expected REGEX=TYPE; did you mean Q4_K?"),
        (["fp8", "--out", "x", "--device", "cuda:99999999999999999999"], "cuda:99999999999999999999"),
        (["doctor", "x.gguf", "--in-place"], "--in-place has no effect without --fix"),
        *((["int4", "--out", "x", "--model", "demo", *given], words) for given, words in IDLE.items()),
        (["gguf", "--out", "x", "--text-only"], "--text-only has no effect without --text"),
        (["mlx", "--out", "x", "--text-only"], "--text-only has no effect without --text"),
        (["plan", "--out", "x", "--size", "5MB", "--text-only"], "--text-only has no effect without --text"),
        (["eval", "x", "--reference", "demo", "--floor-runs", "2"], "--floor-runs has no effect without --floor"),
        (
            ["calibrate", "--out", "x", "--moments", "diagonal", "--store", "bfloat16"],
            "--store has no effect with --mom",
        ),
        (["run", "--init", "--out", "x"], "--out has no effect with --init"),
        (["run", "--init", "--max-disk", "1GB"], "--max-disk has no effect with --init"),
        (["run", "--schema", "r.yaml"], "RECIPE has no effect with --schema"),
        (["run", "r.yaml", "--for", "24gb"], "--for has no effect without --init"),
        (["fp8", "--out", "x", "--max-disk", "infGB"], "'infGB', expected a size such as 5GB, 512MiB or 5e9"),
    ],
)
def test_what_is_typed_wrongly(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, errors = run(monkeypatch, capsys, *arguments)
    assert (code, shown, errors.count("\n")) == (2, "", 1), errors
    assert words in errors


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is longer"), KeyError("x"), RuntimeError("shape")])
def test_a_bug_is_a_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", bug)
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    with pytest.raises(type(error)) as caught:
        cli.main()
    assert caught.value is error


def test_memory_that_runs_out_is_exit_5(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.cli, "main", lambda **_: bytearray(1 << 50))
    code, _, errors = run(monkeypatch, capsys)
    assert (code, errors.count("\n")) == (5, 1)
    assert "out of memory" in errors


def signalled(number: int) -> None:
    """A command that gets the signal while it opens the model."""
    # A background shell has SIGINT ignored
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def stop(*_: object) -> None:
        os.kill(os.getpid(), number)
        while True:  # any thread may get the signal; Python's handler runs between two steps of this one
            time.sleep(0.01)

    opened.open_native = stop
    program(["inspect", "demo"])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_say_what_to_do(name: str, code: int) -> None:
    done = afresh(signalled, int(getattr(signal, name)))
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == "mmquant: interrupted; run the same command again to continue"


def test_another_run_is_named_by_its_first_difference_and_fresh_starts_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "o", ["--model", tiny, "--out", tmp_path / "o"]
    rtn = ["int4", "--method", "rtn", *model, "--tp", "1", "--group-size", "32"]
    command_killed_at(out, "rename .*progress", 3, *rtn, "--attention", "bf16")
    (out / "notes.txt").write_text("mine")
    code, _, errors = run(monkeypatch, capsys, *rtn, "--attention", "fp8", "--dry-run")
    assert code == 5
    assert "unfinished run: --attention bf16, now fp8; choose another folder or start over with --fresh" in errors
    code, _, again = run(monkeypatch, capsys, *rtn, "--attention", "fp8")
    assert (code, again) == (2, errors)
    assert len(errors) < 200
    code, _, errors = run(monkeypatch, capsys, *rtn, "--attention", "fp8", "--fresh")
    assert (code, "holds notes.txt" in errors) == (2, True)  # what is not ours stays and is named
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".mmquant")) == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert run(monkeypatch, capsys, *rtn, "--attention", "fp8")[0] == 0
    code, _, errors = run(monkeypatch, capsys, *rtn, "--attention", "fp8", "--fresh")
    assert (code, "holds a finished artifact" in errors) == (2, True)


@pytest.mark.parametrize(
    "command",
    [["fp8"], ["fp8", "--scheme", "native"], ["int4", "--method", "rtn", "--group-size", "32", "--tp", "1"]],
    ids=" ".join,
)
def test_a_dry_run_refuses_what_the_run_would(
    command: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    arguments = [*command, "--model", tiny, "--out", out, "--dry-run"]
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr("mmquant.runs.place.shutil.disk_usage", lambda _: usage)
    code, shown, errors = run(monkeypatch, capsys, *arguments)
    assert (code, errors.count("\n")) == (5, 1)
    assert "the disk has 1,000 free" in shown
    assert "bytes are needed, the disk has 1,000 free" in errors
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    code, shown, errors = run(monkeypatch, capsys, *arguments)
    assert (code, "holds thesis.txt" in errors) == (5, True)
    assert shown.endswith("fits: no\n")


@pytest.mark.parametrize(
    "command",
    [
        ["fp8"],
        ["fp8", "--scheme", "native"],
        ["bf16"],
        ["int4", "--method", "rtn"],
        ["int4", *FEW, "--text-only"],
        ["mlx", "--method", "rtn"],
        ["gguf", "--type", "Q8_0"],
        ["gguf", *FEW, "--text-only"],
        ["calibrate", *FEW],
    ],
    ids=lambda command: command[0],
)
def test_a_full_disk_leaves_nothing_where_nothing_was(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither notes of a run nor empty folders; a folder that was there stays, empty."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (tmp_path / "a" / "b", mine):
        code, _, errors = run(monkeypatch, capsys, *command, "--model", "demo", "--out", out, "--device", "cpu")
        assert (code, errors.splitlines()[-1].endswith("bytes are needed, the disk has 1,000 free")) == (5, True)
        assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("text", ["none.txt", "default=nan", "none=1"])
@pytest.mark.parametrize("option", ["--text", "--evaluation"])
@pytest.mark.parametrize("command", ["int4", "gguf"])
def test_a_dry_run_refuses_a_text_that_is_not_there(
    command: str,
    option: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [command, "--model", "demo", "--out", tmp_path / "o", "--dry-run", option, text]
    code, _, errors = run(monkeypatch, capsys, *words)
    assert (code, text.split("=")[0] in errors, errors.count("\n")) == (5, True, 1), errors


@pytest.mark.parametrize("entry", ["corpora: {m: {text: [none.txt]}}", "check: {text: [none.txt]}"])
def test_a_dry_run_of_a_recipe_says_where_a_text_is_not(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: demo\n" + entry + "\nvariants: {a: {command: int4, group_size: 32}}\n")
    code, _, errors = run(monkeypatch, capsys, "run", recipe, "--out", tmp_path / "o", "--dry-run")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert re.match(rf"mmquant: {re.escape(str(recipe))}:[23]: (variants.a|check.text): none.txt: no such ", errors)


@pytest.mark.parametrize("bits", ["nan", "inf", "-inf"])
def test_bits_are_a_finite_number(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = run(monkeypatch, capsys, "plan", "--model", "demo", "--out", tmp_path / "o", "--bits", bits)
    assert (code, errors.count("\n"), "--bits" in errors) == (2, 1, True), errors


def test_memory_is_looked_at_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a machine with 1 MB free: calibrated INT4 and GGUF, real runs and dry ones."""
    for module in ("calibration.statistics.live", "calibration.gguf.memory"):
        monkeypatch.setattr(f"mmquant.{module}.free_memory", lambda device: 1_000_000)
    small = ["--model", "demo", "--out", tmp_path / "o", *FEW, "--text-only", "--device", "cpu"]
    for command in ("int4", "gguf"):
        for more in ([], ["--dry-run"]):
            code, _, errors = run(monkeypatch, capsys, command, *small, *more)
            assert (code, errors.count("\n")) == (5, 1), errors
            assert "cpu has 0.01 GiB of memory free, a layer" in errors
            assert "--effort fast" in errors
            assert not (tmp_path / "o").exists()


def test_a_place_that_cannot_be_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file" / "a", tmp_path / "dangling", tmp_path / ("x" * 300)):
        code, _, errors = run(monkeypatch, capsys, "fp8", "--model", tiny, "--out", place)
        assert code == 2
        assert errors.startswith(f"mmquant: {place}")
        assert errors.count("\n") == 1


def test_a_name_that_the_terminal_cannot_show_is_no_failure(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"\xff")
    command = [sys.executable, "-m", "mmquant", "fp8", "--model", str(tiny), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\udcff" in done.stdout
