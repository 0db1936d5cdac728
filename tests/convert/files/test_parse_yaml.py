"""A YAML file of whoever's is one line when it is none, whichever reader has it; a README of a hub breaks nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmquant.convert.card import split_card
from mmquant.convert.files.parse import SMALL_LIMIT, parse_yaml
from mmquant.convert.fitting.targets import read_targets
from mmquant.convert.gguf.metadata import card_fields
from mmquant.errors import InputError
from mmquant.runs.evaluation.result import read_gate
from mmquant.runs.verify.prompts import read_prompts

READERS: dict[str, Callable[[Path], object]] = {
    "targets": read_targets,
    "gate": read_gate,
    "prompts": read_prompts,
    "card": lambda path: split_card(f"---\n{path.read_text()}\n---\n", str(path)),
}
TEXTS = [
    *(
        "a: [",
        "a: 2024-13-45",
        "a: 2024-01-01 25:00:00",
        "a: !!int ''",
        "a: !!bool x",
        "a: !!timestamp x",
        "? [a]\n: b",
    ),
    *("a: !!python/object:os.system x", "a: !!float x", "a: !!binary é", "a: *b", "a: " + "9" * 5000, "[" * 3000),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:16])
def test_what_is_no_yaml_is_one_line(reader: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.yaml.* is not YAML \("):
        READERS[reader](path)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:16])
def test_a_card_that_is_no_yaml_has_no_fields(text: str) -> None:
    assert card_fields(f"---\n{text}\n---\n".encode()) == {}


@pytest.mark.parametrize("reader", ["targets", "gate", "prompts"])
def test_a_file_that_is_not_text_or_has_no_end(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"a\.yaml.* is not YAML \("):
        READERS[reader](path)
    with open(path, "wb") as file:
        file.truncate(SMALL_LIMIT + 1)
    with pytest.raises(InputError, match=f"a\\.yaml: more than {SMALL_LIMIT:,} bytes, expected"):
        READERS[reader](path)


def test_a_mark_of_byte_order_is_skipped() -> None:
    assert parse_yaml("a: 1".encode("utf-8-sig"), "x") == {"a": 1}
