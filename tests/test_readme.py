"""README and docs agree with the tree: their paths exist; the README's commands and options are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from mmquant.commands.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *DOCS]
FOLDERS = ("mmquant", "commands", "runs", "calibration", "convert", "quantize", "tests", "bench", "docs", "notebooks")
EXAMPLES = sorted(set(re.findall(r"`(mmquant [a-z0-9]+ [^`]+)`|^    (mmquant .+)$", README, flags=re.M)))


def test_the_table_lists_every_command_it_names() -> None:
    named = re.findall(r"^\| `([a-z0-9]+)` \|", README, flags=re.M)
    assert named
    assert set(named) <= set(COMMANDS)


@pytest.mark.parametrize("example", [a or b for a, b in EXAMPLES])
def test_examples_parse(example: str) -> None:
    _, name, *arguments = shlex.split(example)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    command.make_context(name, arguments, resilient_parsing=True)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= known


def test_paths_of_the_file_map_exist() -> None:
    """Names at the start of the map's lines, below the folder that the indentation says."""
    block = README.split("## File map")[1].split("## More")[0]
    folder = ROOT
    for line in re.findall(r"^ {4}( *)(\S.*)$", block, flags=re.M):
        indent, text = len(line[0]), re.split(r" {2,}", line[1])[0]
        for name in text.split(", "):
            base = ROOT if indent == 0 else folder
            assert list(base.glob(name.rstrip("/"))), f"{base.name}/{name}"
        if indent == 0:
            folder = ROOT / text.rstrip("/")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_that_documents_name_exist(name: str) -> None:
    """`convert/hub/` or `quantize/fp8.py` in backquotes, and [links](to/files.md) relative to the document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[A-Za-z0-9_./-]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / name).parent.joinpath(path).exists(), path
