"""What commands show on a terminal of 80 columns: whole words, no colour, GiB for memory, examples to copy."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmquant
from helpers.paths import SOURCE
from helpers.screen import Screen, Stream
from mmquant.commands import status
from mmquant.commands.cli import COMMANDS, cli
from mmquant.commands.display import size_of
from mmquant.runs.recipe.templates import PURPOSES
from mmquant.tables import WIDTH, folded, gib, plural

ROOMS = ("commands", "runs", "calibration", "convert")
MEMORY_IN_GB = r"\d GB (of )?(memory|RAM|missing|short|in memory|are left)"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    stream = Tty()
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys, "stdout", stream)
    cli.main(list(words), standalone_mode=False)
    return stream.getvalue()


def check(text: str) -> None:
    assert text.strip()
    wide = [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith(" ")]
    assert [line for line in wide if " " in line] == []
    assert not re.search(MEMORY_IN_GB, text)
    assert "\x1b" not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, and a run."""
    folder = tmp_path_factory.mktemp("a-folder-with-a-long-name-so-that-lines-with-it-are-wide")
    mmquant.quantize_int4("demo", folder / "int4", mmquant.Int4Options(method="rtn"))
    (folder / "recipe.yaml").write_text("model: demo\nvariants:\n  fp8: {command: fp8}\n")
    mmquant.run(folder / "recipe.yaml", folder / "run")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "inspect demo",
        "fit",
        "fit --gpu 24GB --ram 96GB",
        "fit --type Q4_K_M",
        "fit --target 24GB+96GB --type IQ3_M",
        "fit --model demo",
        "fp8 --model demo --out {0}/o --dry-run",
        "int4 --model demo --out {0}/o --group-size 32 --group-size 64 --dry-run",
        "gguf --model demo --out {0}/o --dry-run",
        "calibrate --model demo --windows 2 --out {0}/o --dry-run",
        "eval {0}/int4 --reference demo --windows 1 --context 32 --device cpu",
        "eval {0}/int4 --reference demo --windows 1 --device cpu --dry-run",
        "inspect {0}/int4",
        "doctor {0}/int4",
        "fit {0}/int4",
        "push {0}/int4 --repo me/name --dry-run",
        "report {0}/int4",
        "run {0}/recipe.yaml --out {0}/other --dry-run",
        "run {0}/recipe.yaml --out {0}/run",
        "status {0}/run",
        "completion --install",
        *(f"run --init --for {purpose}" for purpose in PURPOSES),
        "run --init",
    ],
)
def test_a_screen_of_80_columns(words: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(made))
    monkeypatch.setenv("SHELL", "/bin/bash")
    check(shown(monkeypatch, *words.format(made).split()))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_stands_in_one_line(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = click.Context(command, info_name=name, max_content_width=WIDTH, terminal_width=WIDTH)
    lines = command.get_help(context).splitlines()
    examples = [at for at, line in enumerate(lines) if line.startswith("  Example: mmquant ")]
    assert examples
    assert all(not lines[at + 1].strip() for at in examples)
    assert not any("\\" in line for line in lines)


def test_memory_is_never_said_in_gb() -> None:
    pattern = re.compile(r"/ 1e9[^\"]*GB[^\"]*\b(memory|missing|short|RAM|card|left for)\b(?!.*disk)")
    found = [path for room in ROOMS for path in (SOURCE / room).rglob("*.py") if pattern.search(path.read_text())]
    assert found == []
    assert [gib(n) for n in (0, 1, 3 << 29, 10 << 30, 2000 << 30)] == [
        "0.00 GiB",
        "0.01 GiB",
        "1.50 GiB",
        "10.0 GiB",
        "2,000.0 GiB",
    ]
    assert [plural(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]


def test_one_machine_shows_what_fits_and_the_nearest_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, "fit", "--gpu", "24GB", "--ram", "96GB").splitlines()
    assert len(lines) < 30
    assert not any(re.search(r"  no  ", line) for line in lines)
    assert any(line.startswith("do not fit: ") and "missing for Q3_K_L 2." in line for line in lines)
    assert "do not fit: 20 types, mlx_lm needs a Mac's unified memory" in lines
    with pytest.raises(mmquant.FitError):
        shown(monkeypatch, "fit", "--gpu", "8GB", "--ram", "16GB", "--type", "gguf")
    stream = sys.stdout
    assert isinstance(stream, Tty)
    assert sum("GiB missing" in line for line in stream.getvalue().splitlines()) == 5


WORDS = st.lists(st.text("abc中。é", min_size=1, max_size=30), min_size=1, max_size=30)


@given(WORDS, st.integers(1, 60))
def test_folding_keeps_the_words(words: list[str], width: int) -> None:
    text = " ".join(words)
    lines = folded(text, width).split("\n")
    assert " ".join(line.removeprefix("  ") for line in lines) == text
    assert all(line.startswith("  ") for line in lines[1:])
    for line in lines:
        assert " " not in line.removeprefix("  ") or sum(2 if c in "中。" else 1 for c in line) <= width
    assert folded(f"    {text}", width) == f"    {text}"


def test_json_on_a_terminal_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, "fit", "--target", "24GB+96GB", "--type", "IQ3_M", "--json")
    assert text.count("\n") == 1


@pytest.mark.parametrize("columns", [40, 80])
def test_a_glance_at_a_run_leaves_nothing_behind(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, seen = Screen(columns), list[list[str]]()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setattr(sys, "stdout", Stream(screen))
    monkeypatch.setattr(time, "sleep", lambda _: seen.append(list(screen.lines)))
    text = "\n".join(["rr: running", "a row that is wider than a terminal of forty columns", "word " * 40, *"abcdefgh"])
    for _ in range(2):
        status.glance(text)
    assert [line for line in screen.lines if line.strip()] == []
    assert seen[0] == seen[1]
    assert seen[0][0] == "rr: running"
    assert len(seen[0]) <= 12


def test_the_terminal_is_that_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 63, 0, 0))
    with open(slave, "w") as stream:
        assert tuple(size_of(stream)) == (63, 20)
    os.close(master)
    assert size_of(io.StringIO())[0] == 200
