"""Commands in README and docs parse, run in their order, and print the figures that stand beside them.

Every command line of README.md and docs/*.md is parsed (make test). README.md and docs/gguf.md are executed as well,
each in one folder: the README's first block in make test, everything in make test-slow. A server of both hubs stands in
for them; the repositories that the text names hold the demo model there. Only parsed, because they need what a reader
brings or several GPUs: docs/calibration.md, docs/eval.md, docs/hubs.md, docs/lab.md.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from helpers.chat_server import ChatServer, said
from helpers.command import mmquant
from helpers.hub_server import HubServer
from helpers.paths import ROOT
from mmquant.commands.cli import COMMANDS, cli
from mmquant.convert.open import demo_folder

DOCUMENTS = [
    "README.md",
    "README.zh.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]
PLACEHOLDER = re.compile(r"\b(?:MODEL|DIR|FILE|OUT|ARTIFACT|ARGUMENTS|ORG/NAME)\b|\.\.\.|\[")
REPOSITORIES = ("MiniMaxAI/MiniMax-M2.7", "ORG/MiniMax-M2.7")


def commands(text: str) -> list[str]:
    """Every `mmquant ...` of a document in order, in code blocks (a backslash continues a line) and within lines.

    Forms with placeholders (`mmquant doctor FILE`) are no commands.
    """
    text = text.replace("\\\n", " ")
    found = re.findall(r"^ {4}(?:\$ )?(mmquant .+)$|`(mmquant [a-z0-9]+ [^`]+)`", text, flags=re.M)
    lines = [re.sub(r"\s{2,}#.*", "", block or line).strip() for block, line in found]
    return [line for line in lines if not PLACEHOLDER.search(line)]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def under_torchrun(text: str) -> list[str]:
    """The mmquant commands of `torchrun ... -m mmquant ...` lines."""
    lines = re.findall(r"^ {4}.*torchrun .* -m (mmquant .+)$", text.replace("\\\n", " "), flags=re.M)
    return [line.strip() for line in lines if not PLACEHOLDER.search(line)]


ALL = [(name, line) for name in DOCUMENTS for line in (*commands(read(name)), *under_torchrun(read(name)))]


@pytest.mark.parametrize(("name", "line"), ALL)
def test_commands_parse(name: str, line: str) -> None:
    _, command, *arguments = shlex.split(line)
    assert command in COMMANDS
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    found.make_context(command, [a for a in arguments], resilient_parsing=True)
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_speak_of_what_there_is(name: str) -> None:
    text = read(name)
    named = set(re.findall(r"`mmquant ([a-z0-9]+)\b", text)) | set(
        re.findall(r"^ {4}mmquant ([a-z0-9]+)\b", text, re.M)
    )
    assert named <= set(COMMANDS)
    planned = [word for word in ("plan",) if word not in COMMANDS]
    assert not [word for word in planned if f"`{word}`" in text or f"`mmquant {word}`" in text]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Both hubs, with the demo model under the names that the text has."""
    with HubServer() as server:
        files = {p.name: p.read_bytes() for p in demo_folder().iterdir() if p.is_file()}
        files["README.md"] = b"---\nlicense: other\nlicense_name: demo\nlicense_link: LICENSE\n---\n# Demo\n"
        for repository in REPOSITORIES:
            server.seed(repository, files)
        yield server


def run(line: str, folder: Path, hub: HubServer) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **hub.environment(), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"MMQUANT_CACHE": str(folder / ".cache"), "CUDA_VISIBLE_DEVICES": ""}
    name, *arguments = shlex.split(line)
    assert name == "mmquant"
    return mmquant(*arguments, env=environment, cwd=folder)


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """Rows of Markdown tables by their first cell."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells}


def close(printed: str, value: float) -> bool:
    """Whether a printed figure is `value`, within three of its last digits: CPUs differ in the order of their sums."""
    number = printed.replace(",", "").removesuffix("%").strip()
    digits = len(number.partition(".")[2])
    return abs(float(number) - value) <= (3 * 10**-digits if digits else 0)


def check_row(printed: list[str], found: dict[str, Any]) -> None:
    names = ("bytes", "bits_per_weight", "ppl", "kld", "top1")
    values = [found[name] * (100 if name == "top1" else 1) for name in names]
    for name, text, value in zip(names, printed, values, strict=True):
        assert close(text, value), f"{name}: {value} is printed as {text}"


@pytest.mark.slow  # `make demo` runs them on every machine that runs the tests
def test_the_readmes_first_commands(tmp_path: Path, hub: HubServer) -> None:
    for line in commands(section(read("README.md"), "Two commands")):
        done = run(line, tmp_path, hub)
        assert done.returncode == 0, f"{line}: {done.stderr}"


IN_README = {
    "FP8 native, FP8 block": ("fp8-native", "fp8-block"),
    "FP8 per channel": ("fp8-channel",),
    "INT4 g128, round to nearest": ("int4-rtn-g128",),
    "INT4 g32, round to nearest": ("int4-rtn-g32",),
    "INT4 g128, calibrated": ("int4-gptq-g128",),
    "NVFP4, calibrated": ("nvfp4-gptq",),
    "MXFP4, calibrated": ("mxfp4-gptq",),
    "MLX 3 bits g64, calibrated": ("mlx-gptq-3bit",),
    "BF16": ("bf16",),
    "GGUF BF16": ("gguf-BF16",),
    "GGUF Q8_0": ("gguf-Q8_0",),
    "GGUF Q6_K": ("gguf-Q6_K",),
    "GGUF Q4_K_M, uncalibrated": ("gguf-Q4_K_M",),
    "GGUF Q4_K_M, calibrated": ("gguf-Q4_K_M-calibrated",),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_in_order(tmp_path: Path, hub: HubServer) -> None:
    text = read("README.md")
    with ChatServer(lambda asked: said("yes")) as server:
        for line in commands(text):
            done = run(line.replace("http://127.0.0.1:8000", server.url), tmp_path, hub)
            assert done.returncode == 0, f"{line}: {done.stderr}"
    table = rows(section(read("docs/quality.md"), "Every variant of the demo model"))
    for artifact in json.loads((tmp_path / "demo-out" / "summary.json").read_text())["rows"]:
        label = next(label for label, names in IN_README.items() if artifact["variant"] in names)
        check_row(table[label], artifact)


def agree(printed: str, found: str) -> bool:
    """Whether two lines have the same words, numbers with a fraction within 1 %."""
    number = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
    words = number.sub("#", printed) == number.sub("#", found)
    pairs = zip(number.findall(printed), number.findall(found), strict=False)
    return words and all(abs(float(a) - float(b)) <= 0.01 * abs(float(b)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_docs_gguf_in_order(tmp_path: Path, hub: HubServer) -> None:
    """Lines after a `$ mmquant ...` are what it prints in 80 columns, on stdout and then on stderr."""
    text = read("docs/gguf.md")
    for line in commands(text):
        done = run(line, tmp_path, hub)
        printed = r"(?: {4}[^$\n].*\n|\n(?= {4}[^$\s]))*"
        shown = re.search(rf"^ {{4}}\$ {re.escape(line)}(  .*)?\n({printed})", text, flags=re.M)
        fails = shown is not None and "exit code 4" in (shown[1] or "")
        assert done.returncode == (4 if fails else 0), f"{line}: {done.stderr}"
        if shown is not None and shown[2]:
            said = [word for word in done.stderr.splitlines() if word.startswith("mmquant: ")]
            wanted = [word.strip() for word in shown[2].splitlines() if word]
            found = [word.strip() for word in done.stdout.splitlines() if word] + said
            assert len(wanted) == len(found), found
            assert all(map(agree, wanted, found)), found
