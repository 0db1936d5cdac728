"""An architecture is one package and one row: no other module knows the names of its tensors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from helpers.paths import SOURCE
from helpers.tiny import CONFIG
from mmquant.convert.models import ARCHITECTURES, architecture_of
from mmquant.errors import InputError

ROOMS = ("commands", "runs", "calibration", "convert", "quantize")
TELLS = re.compile(r"block_sparse_moe|minimax[-_:]", re.IGNORECASE)
REPOSITORY = re.compile(r"\S*MiniMaxAI/MiniMax-M2\.7\S*")  # a name that users type, not a fact of the architecture
MODELS = SOURCE / "convert" / "models"
PRODUCT = [p for room in ROOMS for p in sorted((SOURCE / room).rglob("*.py")) if not p.is_relative_to(MODELS)]


def words(text: str) -> list[tuple[int, str]]:
    """(line, constant) of every string, docstrings and prose aside, that holds a fact of the architecture."""
    tree = ast.parse(text)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    code = [(n.lineno, REPOSITORY.sub("", n.value)) for n in found if id(n) not in prose and isinstance(n.value, str)]
    return [(line, value) for line, value in code if TELLS.search(value.replace("MiniMax-M2", ""))]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_names_its_tensors(path: Path) -> None:
    assert not words(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("code", ['"re:.*block_sparse_moe.gate$"', 'x == "minimax-m2"', '"<minimax:tool_call>"'])
def test_the_test_sees_it(code: str) -> None:
    assert words(f"x = {code}")


def test_the_table_knows_an_architecture_by_either_key() -> None:
    for row in ARCHITECTURES.values():
        assert architecture_of({"model_type": row.model_type}) is row
        assert architecture_of({"architectures": [row.class_name]}) is row
    assert architecture_of(CONFIG).geometry(CONFIG).layers == CONFIG["num_hidden_layers"]


@pytest.mark.parametrize("config", [{}, {"model_type": "qwen3_moe"}, {"architectures": ["A", "B"]}])
def test_another_architecture_is_named(config: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"architecture is ('nothing'|'qwen3_moe'|A, B), expected MiniMaxM2"):
        architecture_of(config)
