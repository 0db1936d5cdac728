"""The documentation site: its pages say what the code says, and it builds and opens without a network."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

import mmquant
from helpers.paths import PACKAGE, ROOT, SOURCE
from mmquant import FitOptions
from mmquant.commands.cli import cli
from mmquant.convert.formats.format import Scheme
from mmquant.convert.formats.table import FORMATS
from mmquant.quantize.ggml.types import GGMLType

DOCS = ROOT / "docs"
SOURCES = {PACKAGE, *(SOURCE / name for name in ("commands", "runs", "calibration", "convert", "quantize"))}
ENGINES = (
    "vllm serve",
    "SAFETENSORS_FAST_GPU",
    "python -m sglang",
    "llama-server",
    "llama-gguf-split",
    "lms import",
    "mlx_lm",
)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_rows(text: str) -> list[list[str]]:
    """Rows of all Markdown tables but their heads and rules."""
    lines = text.splitlines()
    kept = [i for i, line in enumerate(lines) if line.startswith("| ") and not set(line) <= set("|- ")]
    heads = {i for i in kept if i + 1 < len(lines) and set(lines[i + 1]) <= set("|- ") and lines[i + 1]}
    return [cells(lines[i]) for i in kept if i not in heads]


@functools.cache
def sources() -> str:
    """The code's text; strings that go on in the next line are whole."""
    texts = [path.read_text(encoding="utf-8") for folder in SOURCES for path in folder.rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def test_messages_of_troubleshooting_are_the_codes_own() -> None:
    for first, *_ in table_rows(page("troubleshooting.md")):
        for message in re.findall(r"`([^`]+)`", first):
            for part in re.split(r"\s*\.\.\.\s*", message):
                assert part in sources(), f"{message!r}: the code has no {part!r}"


def fitted(text: str) -> set[str]:
    """Every line that the document's own `mmquant fit --target ... --type ...` print for engines."""
    lines: set[str] = set()
    for line in re.findall(r"`mmquant fit ((?:--[a-z-]+ \S+ ?)+)`", text):
        words = shlex.split(line)
        given = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)}
        if {"target", "type"} <= given.keys() and given["target"] != "MACHINE":
            context = int(given["context"]) if "context" in given else None
            options = FitOptions(**{**given, "context": context})  # type: ignore[arg-type]
            fits = mmquant.fit(options=options)
            assert fits.refusal is None, line
            lines |= {command.line for command in fits.commands(fits.fits[0])}
    return lines


def test_serving_commands_are_those_of_fit() -> None:
    text = page("serving.md")
    blocks = [line.strip() for line in re.findall(r"^ {4}(.+)$", text, re.M) if line.strip().startswith(ENGINES)]
    assert len(blocks) >= 8
    assert set(blocks) <= fitted(text), set(blocks) - fitted(text)


def test_every_type_of_fit_is_made_by_a_command() -> None:
    """What `mmquant fit` says a type is made by is a command line that is taken."""
    fits = mmquant.fit(options=FitOptions(target="512GB-unified"))
    assert len(fits.fits) > 60
    for found in fits.fits:
        _, name, *arguments = fits.made_by(found)
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        command.make_context(name, list(arguments))


def test_sizes_and_contexts_of_recipes_are_those_of_fit() -> None:
    rows = [row for row in table_rows(page("recipes.md")) if "mmquant fit" in row[-1]]
    assert len(rows) >= 6
    for row in rows:
        target, kind = re.findall(r"--target (\S+) --type (\S+)`", row[-1])[0]
        (found,) = mmquant.fit(options=FitOptions(target=target, type=kind)).rows()
        assert row[1:4] == [kind, f"{found['bytes'] / 1e9:.1f}", f"{found['context'] // 1024}K"]


def test_tensors_of_folders_are_the_formats_parts() -> None:
    """docs/bytes.md: suffix, dtype and shape of every format that a command writes."""
    n, k, group = 512, 1024, 64
    said: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    name = ""
    for row in table_rows(page("bytes.md").split("## GGUF")[0]):
        name = row[0] or name
        shape = row[3].replace("scalar", "").replace("g", str(group))
        sizes = tuple(int(eval(part, {"N": n, "K": k})) for part in shape.split(",") if part.strip())
        said.setdefault(name, []).append((row[1].strip("`"), row[2], sizes))
    words = {
        "float-quantized": ("`float-quantized`, tiles", "`float-quantized`, channels"),
        "modelopt": ("`modelopt` (NVFP4)",),
    }
    checked: set[str] = set()
    for row in FORMATS:
        if not row.command or row.choice == "native":  # native: the release's own tensors, copied
            continue
        labels = words.get(row.name, (f"`{row.name}`",))
        label = labels[-1] if row.name == "float-quantized" and not row.tiled else labels[0]
        wide = row.group_sizes[0] if row.group_sizes else -1 if label.endswith("channels") else group
        scheme = Scheme(row, row.bits[0], wide, block=(128, 128) if row.tiled else None)
        assert said[label] == [(p.suffix, p.dtypes[0], p.shape) for p in row.parts(scheme, (n, k))], label
        checked.add(label)
    assert checked == set(said)


def test_gguf_blocks_have_their_bytes() -> None:
    rows = table_rows(page("bytes.md").split("## GGUF")[1])
    for name, columns, size, bits, _ in rows:
        kind = GGMLType[name]
        assert (int(columns), int(size)) == (kind.block_columns, kind.block_bytes), name
        assert bits == f"{8 * int(size) / int(columns):.2f}"


def test_every_public_name_is_in_the_reference() -> None:
    named = set(re.findall(r"^::: (\S+)$", page("reference.md"), re.M))
    public = {f"mmquant.{module}.{name}" for module, name in mmquant._PUBLIC.values()}
    assert public <= named, f"add to docs/reference.md: {sorted(public - named)}"


def test_figures_are_what_their_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "figures")
    for name, draw in importlib.import_module("draw").DIAGRAMS.items():
        assert (DOCS / "figures" / f"{name}.svg").read_text(encoding="utf-8") == draw().svg(), name


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_links_between_pages_stay_within_the_site() -> None:
    for path in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?![a-z]+:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            target = (path.parent / link).resolve()
            assert target.is_relative_to(DOCS), f"{path.name}: {link}"
            assert target.is_file(), f"{path.name}: {link}"


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody(tmp_path: Path) -> None:
    """Strictly (links and anchors resolve), with every proxy shut; no page loads anything from elsewhere."""
    shut = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **shut}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for path in pages:
        html = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?src=[\"']?([^\"' >]+)", html)
        loaded += [
            link for tag in re.findall(r"<link\b[^>]*>", html) for link in re.findall(r"href=[\"']?([^\"' >]+)", tag)
        ]
        assert not [one for one in loaded if re.match(r"(https?:)?//", one)], path.name


@pytest.mark.parametrize("name", ["01_quickstart", "03_fit_my_machine"])
def test_chinese_notebooks_run_the_same_code(name: str) -> None:
    books = [json.loads((ROOT / "notebooks" / f"{name}{end}.ipynb").read_text("utf-8")) for end in ("", ".zh")]
    english, chinese = ([(cell["cell_type"], cell["source"]) for cell in book["cells"]] for book in books)
    assert [kind for kind, _ in english] == [kind for kind, _ in chinese]
    assert [s for kind, s in english if kind == "code"] == [s for kind, s in chinese if kind == "code"]


def test_notebooks_use_the_public_api_and_hold_their_outputs() -> None:
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(paths) == 7
    for path in paths:
        assert "site-packages" not in path.read_text("utf-8"), path.name  # a warning, with a machine's path
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        code = "\n".join("".join(cell["source"]) for cell in cells)
        assert not re.search(r"mmquant\.(commands|runs|calibration|convert|quantize)\b", code), path.name
        assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) // 2, path.name
