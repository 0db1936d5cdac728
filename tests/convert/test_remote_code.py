"""auto_map goes along with all of its code, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from helpers.tiny import CONFIG, write_tiny
from mmquant.commands.cli import cli
from mmquant.convert.remote_code import code_files, with_code

CODE = {"modeling_x.py": b"import os\nfrom .configuration_x import C\n", "configuration_x.py": b"class C: ...\n"}
MODEL = {"AutoModelForCausalLM": "modeling_x.M"}


@pytest.mark.parametrize(
    ("entries", "files", "kept", "carried"),
    [
        (MODEL, CODE, MODEL, set(CODE)),
        (MODEL, {"modeling_x.py": CODE["modeling_x.py"]}, None, set()),
        (MODEL, {}, None, set()),
        (
            MODEL | {"AutoConfig": "configuration_x.C"},
            {"configuration_x.py": b""},
            {"AutoConfig": "configuration_x.C"},
            {"configuration_x.py"},
        ),
        (
            {"AutoTokenizer": ["configuration_x.Slow", None]},
            CODE,
            {"AutoTokenizer": ["configuration_x.Slow", None]},
            {"configuration_x.py"},
        ),
        ({"AutoConfig": "org/repo--configuration_x.C"}, {}, {"AutoConfig": "org/repo--configuration_x.C"}, set()),
        ({"AutoConfig": "../evil.C"}, {"../evil.py": b""}, None, set()),
        ({"AutoConfig": None}, CODE, None, set()),
        ({"AutoConfig": 7}, CODE, None, set()),
        ("modeling_x.M", CODE, None, set()),
        ({}, CODE, None, set()),
    ],
)
def test_entries_are_kept_with_their_files(entries: Any, files: dict[str, bytes], kept: Any, carried: set[str]) -> None:
    found = with_code({"a": 1, "auto_map": entries}, files.get)
    assert found == ({"a": 1} if kept is None else {"a": 1, "auto_map": kept})
    assert set(code_files(found, files.get)) == carried


@pytest.mark.parametrize("scheme", ["block", "native"])
@pytest.mark.parametrize("there", [True, False])
def test_folders_that_are_written(tmp_path: Path, scheme: str, there: bool) -> None:
    model = write_tiny(tmp_path / "model", auto_map=MODEL)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}})
    )
    for name, data in CODE.items() if there else ():
        (model / name).write_bytes(data)
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["fp8", "--scheme", scheme, "--model", str(model), "--out", str(out)])
    assert done.exit_code == 0, done.exception
    config = json.loads((out / "config.json").read_text())
    assert config.get("auto_map") == (MODEL if there else None)
    assert {p.name for p in out.glob("*.py")} == (set(CODE) if there else set())
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert config["hidden_size"] == CONFIG["hidden_size"]
