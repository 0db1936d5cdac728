"""Imports between packages go one way; each package keeps to its libraries; no error is swallowed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.checkout
ROOT = Path(__file__).parent.parent
# A package may import itself and every package to its right.
PACKAGES = ("commands", "runs", "calibration", "convert", "quantize")
# Modules of the package itself that every package may import: they import nothing.
SHARED = ("mmquant", "mmquant.errors", "mmquant.monitor", "mmquant.stages", "mmquant.tables")
# Third-party libraries of each package. What is not listed is a decision that has not been made yet.
LIBRARIES = {
    "quantize": {"torch", "numpy", "numba", "llvmlite", "triton"},
    "convert": {
        "torch",
        "numpy",
        "filelock",
        "safetensors",
        "gguf",
        "huggingface_hub",
        "modelscope_hub",
        "requests",
        "yaml",
        "jsonschema",
    },
    "calibration": {"triton", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "gguf"},
    "runs": {"torch", "numpy", "yaml", "jinja2", "jsonschema", "tokenizers", "safetensors", "gguf"},
    "commands": {"click"},
}
# Libraries that single modules may import besides: optional ones, and tables that upstream publishes.
MODULES = {
    "quantize/ggml/codebook/tables.py": {"gguf"},  # ggml's codebooks of the IQ types
    "convert/hub/http.py": {"urllib3"},  # requests' own transport, for its errors and retries
    "calibration/plan/knapsack.py": {"scipy"},  # HiGHS
    "runs/evaluation/llamacpp.py": {"xllamacpp"},  # extra: llamacpp
    "runs/evaluation/vllm_engine.py": {"vllm"},  # the user's own installation
    "runs/verify/client.py": {"requests"},
    "runs/verify/engine.py": {"requests"},
    "runs/verify/prompts.py": {"yaml"},
    "runs/verify/score.py": {"scipy"},  # the exact sign test
    "runs/reports/plots.py": {"matplotlib"},  # extra: report
}
NEVER = {"llmcompressor", "auto_gptq", "compressed_tensors", "transformers", "accelerate"}  # tests and peers only


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


ALL = [path for package in PACKAGES for path in modules(package)]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, `mmquant.PACKAGE...` for our own, relative ones resolved."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ("mmquant", *parts[:-1])
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield stem
            if stem == "mmquant":  # a package, or what mmquant/__init__.py itself defines
                yield from (f"mmquant.{alias.name}" for alias in node.names if alias.name in PACKAGES)


def own_package(name: str) -> str:
    """The package of one of our dotted names."""
    return name.split(".")[1]


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = package_of(path)
    allowed = set(PACKAGES[PACKAGES.index(package) :])
    for name in imported(path):
        if name.split(".")[0] == "mmquant":
            assert name in SHARED or own_package(name) in allowed, f"{package} imports {name}"
        assert name.split(".")[0] not in PACKAGES, f"import mmquant.{name} (or relatively), not the bare folder"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_libraries_of_a_package(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        if top == "mmquant" or top in sys.stdlib_module_names:
            continue
        assert top not in NEVER, f"{top} is for tests"
        allowed = LIBRARIES[package_of(path)] | MODULES.get(path.relative_to(ROOT).as_posix(), set())
        assert top in allowed, f"{top} is not a library of {package_of(path)}/"


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.name))
def test_packages_import_each_other_relatively(path: Path) -> None:
    """Absolute names would be invisible to editors, which follow files (package-dir maps them only at run time)."""
    tree = tree_of(path)
    absolute = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level and n.module]
    assert not [name for name in absolute if name.startswith("mmquant.") and name not in SHARED]


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), "the first line says what the module is"


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler of everything keeps the error to itself: neither raised again nor handed on by name."""
    if handler.type is not None and ast.unparse(handler.type) not in ("Exception", "BaseException"):
        return False
    inside = [node for statement in handler.body for node in ast.walk(statement)]
    handed_on = any(isinstance(node, ast.Name) and node.id == handler.name for node in inside)
    return not handed_on and not any(isinstance(node, ast.Raise) and node.exc is None for node in inside)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_swallowed(path: Path) -> None:
    tree = tree_of(path)
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and swallows(node)]
    assert not lines, f"line {lines}: name the errors that are expected"


def test_every_package_is_installed() -> None:
    """The wheel is told its folders one by one; one that is forgotten would be missing from it."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(tool["only-include"]) == {"mmquant", *PACKAGES}
    assert tool["sources"] == {package: f"mmquant/{package}" for package in PACKAGES}
    for folder in {path.parent for path in ALL}:
        assert (folder / "__init__.py").is_file(), folder


def test_editors_find_the_packages() -> None:
    """pyright reads typings/mmquant, where each package is a link to its folder."""
    for package in PACKAGES:
        link = ROOT / "typings" / "mmquant" / package
        assert link.resolve() == (ROOT / package).resolve(), f"typings/mmquant/{package} should link to {package}"


def test_import_is_light() -> None:
    """`import mmquant` and the command line's help load no torch: they answer at once."""
    code = "import sys, mmquant.commands.cli; "
    code += "print(sorted({'torch', 'gguf', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_a_checkout_called_mmquant_does_not_hide_the_package(tmp_path: Path) -> None:
    """Python looks in the current folder first: there a checkout of that name is a folder without __init__.py."""
    (tmp_path / "mmquant").symlink_to(ROOT)
    code = "import mmquant.commands.cli, mmquant.convert.files.lock; print(mmquant.__version__)"
    for command in (["-c", code], ["-m", "mmquant", "--version"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_a_bare_package_cannot_be_imported_twice() -> None:
    """`import convert.x` from the checkout fails loudly instead of loading a second copy of the module."""
    code = "import convert.open"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "beyond top-level package" in done.stderr
