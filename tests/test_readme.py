"""README and docs agree with the tree: their paths exist; the README's commands and options are real."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import mmquant
from mmquant import FitOptions
from mmquant.commands.cli import COMMANDS, cli
from mmquant.convert.fitting.targets import read_targets
from mmquant.runs.recipe.templates import PURPOSES, template

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
DOCUMENTS = ["README.md", "README.zh.md", "CONTRIBUTING.md", *DOCS]
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


@pytest.mark.checkout
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


@pytest.mark.checkout
@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_that_documents_name_exist(name: str) -> None:
    """`convert/hub/` or `quantize/fp8.py` in backquotes, and [links](to/files.md) relative to the document."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[A-Za-z0-9_./-]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / name).parent.joinpath(path).exists(), path


CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[str]]:
    """Cells of every table row but rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not set(line) <= set("|- ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def typed(text: str) -> list[str]:
    """What a reader types: lines of code blocks without their remarks, the file map's without what is said of them."""
    return [re.split(r" {2,}", line)[0] for line in re.findall(r"^ {4} *(\S.*)$", text, flags=re.M)]


def test_the_readme_is_short_and_names_every_command() -> None:
    assert len(README.splitlines()) < 150
    named = re.findall(r"^\| `([a-z0-9]+)` \|", README, flags=re.M)
    assert sorted(named) == sorted(COMMANDS)


def test_the_machines_table_is_what_fit_says() -> None:
    rows = tables(README.split("## Your machine")[1].split("\n## ")[0])[1:]
    assert len(rows) >= 8
    assert f"which knows {len(read_targets())} machines" in README
    for machine, file, context, make, serve in rows:
        target = re.findall(r"`(\S+)`", machine)[0]
        kind, size = file.split(", ")
        options = FitOptions(target=target, type=kind, context=1024 * int(context.removesuffix("K")))
        fits = mmquant.fit(options=options)
        (found,) = fits.fits
        assert found.verdict == "yes", machine
        assert size == f"{found.weights.total / 1e9:.1f} GB", machine
        made = shlex.split(make.strip("`"))
        assert made[:-1] == [
            word for word in fits.made_by(found)[:-1] if word not in ("--format", "compressed-tensors")
        ]
        argv = list(fits.commands(found)[0].argv)
        words = shlex.split(serve.strip("`"))
        shown = [word for word in words if word not in ("FILE", "OUT", "...")]
        assert shown == [word for word in argv if not word.startswith("./")][: len(shown)], machine
        assert words[-1] == "..." or len(shown) == len(argv) - 1


def test_the_recipes_for_a_machine_make_what_its_rows_name() -> None:
    rows = tables(README.split("## Your machine")[1].split("\n## ")[0])[1:]
    named = {target: make for machine, _, _, make, _ in rows for target in re.findall(r"`(\S+)`", machine)}
    made: dict[str, dict[str, Any]] = {purpose: yaml.safe_load(template(purpose)) for purpose in PURPOSES}
    assert set(made["24gb"]["fit"]["targets"]) == {target for target in named if target.startswith("24GB+")}
    assert made["2xa100"]["fit"]["targets"] == ["2xA100-80GB"]
    for purpose in ("24gb", "2xa100"):
        for target in made[purpose]["fit"]["targets"]:
            _, command, *words = shlex.split(named[target].strip("`"))[:-2]
            options = {w.removeprefix("--").replace("-", "_"): v for w, v in zip(words[::2], words[1::2], strict=True)}
            asked = {"command": command} | {name: int(v) if v.isdigit() else v for name, v in options.items()}
            assert any(asked.items() <= variant.items() for variant in made[purpose]["variants"].values()), target
    types = {named[target].split("--type ")[1].split()[0] for target in made["24gb"]["fit"]["targets"]}
    assert set(made["24gb"]["variants"]) == types


def test_the_quality_table_is_what_was_kept() -> None:
    kept = json.loads((ROOT / "docs" / "figures" / "by-bytes.json").read_text())["rows"]
    rows = tables(README.split("## Quality by bytes")[1].split("\n## ")[0])[1:]
    for row, k in zip(rows, kept, strict=True):
        ours = [k["file"], f"{k['bytes']:,}", f"{k['kld']:.4f}", f"{100 * k['top1']:.1f}", k["by"]]
        ratio = f"{k['kld'] / k['kld_other']:.2f}"
        assert row == [*ours, f"{k['kld_other']:.4f}", f"{100 * k['top1_other']:.1f}", ratio]


def test_the_chinese_readme_is_in_step() -> None:
    """Headings, commands, tables, figures, names in backquotes and links are those of the English one."""
    assert [len(h) for h in re.findall(r"^(#+) ", CHINESE, flags=re.M)] == [
        len(h) for h in re.findall(r"^(#+) ", README, flags=re.M)
    ]
    assert typed(CHINESE) == typed(README)
    for english, chinese in zip(tables(README), tables(CHINESE), strict=True):
        assert len(english) == len(chinese)
        for a, b in zip(english, chinese, strict=True):
            assert sorted(re.findall(r"`[^`]+`", a)) == sorted(re.findall(r"`[^`]+`", b)), b
            assert re.fullmatch(r"[\d.,]+", a) is None or a == b
    prose = [re.sub(r"^( {4}|\|).*$", "", text, flags=re.M) for text in (README, CHINESE)]
    quoted, numbers = ([sorted(re.findall(p, text)) for text in prose] for p in (r"`[^`]+`", r"\d+\.\d\d"))
    assert quoted[0] == quoted[1]
    assert numbers[0] == numbers[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.zh.md", "README.md"} for text in (README, CHINESE)]
    assert links[0] == links[1]
