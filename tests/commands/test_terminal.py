"""What every command has at the terminal: help that fits, an example, --json, -q, -v; progress in lines; completion."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import click
import pytest

from helpers import command
from helpers.hub_server import HubServer
from helpers.paths import PACKAGE, ROOT, SOURCE
from mmquant.commands.cli import COMMANDS, cli
from mmquant.commands.completion import PLACES, place, shell_of
from mmquant.commands.display import progress_line
from mmquant.commands.options import begin
from mmquant.commands.terminal import complain, print_result
from mmquant.errors import InputError
from mmquant.runs.place import PROGRESS

ROOMS = ("commands", "runs", "calibration", "convert", "quantize")


def mmquant(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return command.mmquant(*words, env={**os.environ, **environment})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_the_common_options(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    context = click.Context(command, info_name=name, max_content_width=80, terminal_width=80)
    shown = command.get_help(context)
    assert re.search(rf"Examples?:\s.*mmquant {name}\b", shown, re.S)
    for option in ("--json", "-q, --quiet", "-v, --verbose", "--help"):
        assert option in shown, option
    assert max(map(len, shown.splitlines())) <= 80


def test_quiet_leaves_the_result_alone(tmp_path: Path) -> None:
    loud = mmquant("fp8", "--model", "demo", "--dry-run", "--out", str(tmp_path / "a"))
    quiet = mmquant("fp8", "--model", "demo", "--out", str(tmp_path / "a"), "-q")
    assert loud.returncode == quiet.returncode == 0, quiet.stderr
    assert quiet.stdout == f"{tmp_path / 'a'}\n"
    assert quiet.stderr == ""
    again = mmquant("fp8", "--model", "demo", "--out", str(tmp_path / "a"), "-q")
    assert again.stderr.startswith("mmquant: ") or again.returncode == 0


def test_verbose_shows_requests_and_tracebacks(hub: HubServer) -> None:
    done = mmquant("inspect", "hf:org/none", "-v", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_TOKEN="secret-word")
    assert done.returncode != 0
    assert re.search(r"mmquant: GET http://127\.0\.0\.1:\d+/api/models/org/none\S*: 40\d", done.stderr)
    assert "Traceback" in done.stderr
    assert "secret-word" not in done.stderr


def test_under_torchrun_the_first_process_alone_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PROGRESS).write_text("{}")
    with click.Context(cli) as context:
        context.meta["mmquant.fresh"] = True
        for rank, left in (("1", True), ("0", False)):
            monkeypatch.setenv("RANK", rank)
            assert begin(tmp_path, dry_run=True) is None
            assert (tmp_path / PROGRESS).exists()
            assert begin(tmp_path, dry_run=False) == tmp_path
            assert (tmp_path / PROGRESS).exists() == left


@pytest.fixture
def hub() -> object:
    with HubServer() as server:
        yield server


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("pull", "B", 5 * 10**9, 10**10, 1e8), "pull: 5.00 of 10.00 GB, 0.10 GB/s, 0:50 left"),
        (("pull", "B", 5 * 10**9, None, 1e8), "pull: 5.00 GB, 0.10 GB/s"),
        (("x", "layer", 3, 62, 0.05), "x: layer 3 of 62, 20 s each, 19:40 left"),
        (("x", "layer", 3, 62, 0.005), "x: layer 3 of 62, 200 s each, 3:16:40 left"),
        (("x", "window", 3, 62, 4.0), "x: window 3 of 62, 4/s, 0:15 left"),
        (("x", "window", 0, 62, 0.0), "x: window 0 of 62"),
    ],
)
def test_a_line_says_what_is_done_how_fast_and_how_long_still(
    given: tuple[str, str, int, int | None, float], line: str
) -> None:
    assert progress_line(*given) == line


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    done = mmquant("completion", "bash", "--install", XDG_DATA_HOME=str(tmp_path))
    path = tmp_path / "bash-completion" / "completions" / "mmquant"
    assert str(path) in done.stdout
    subprocess.run(["bash", "-n", str(path)], check=True)
    asked = mmquant(_MMQUANT_COMPLETE="bash_complete", COMP_WORDS="mmquant nvf", COMP_CWORD="1")
    assert asked.stdout.split() == ["plain,nvfp4"]
    asked = mmquant(_MMQUANT_COMPLETE="bash_complete", COMP_WORDS="mmquant fp8 --sch", COMP_CWORD="2")
    assert asked.stdout.split() == ["plain,--scheme"]


def test_every_shell_has_a_place_and_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    for shell in PLACES:
        assert place(shell).is_relative_to(tmp_path)
        assert shell_of(f"/usr/bin/{shell}") == shell
    with pytest.raises(InputError, match=r"SHELL is '/bin/tcsh', expected"):
        shell_of("/bin/tcsh")


def test_the_table_of_variables_is_complete() -> None:
    """Variables of mmquant that the code reads are those of docs/terminal.md, no more and no fewer."""
    read: set[str] = set()
    for folder in (PACKAGE, *(SOURCE / room for room in ROOMS)):
        for path in folder.rglob("*.py"):
            read |= set(re.findall(r"\bMMQUANT_[A-Z_]+\b", path.read_text()))
    written = set(re.findall(r"^\| `(MMQUANT_[A-Z_]+)`", (ROOT / "docs" / "terminal.md").read_text(), re.M))
    assert written == read - {"MMQUANT_COMPLETE"}


def test_what_is_shown_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """A server's model may be called anything, and so may a tensor of a file."""
    evil = "a\x1b[2J\x07\r\x9bb\tc\nmodèle 模型\u3000x"
    clean = "a\ufffd[2J\ufffd\ufffd\ufffdb\tc\nmodèle 模型\u3000x"
    print_result(evil)
    complain(evil)
    assert capsys.readouterr() == (clean + "\n", clean + "\n")
    print_result('{"a": "\\u001b"}', as_json=True)
    assert capsys.readouterr().out == '{"a": "\\u001b"}\n'
