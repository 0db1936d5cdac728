"""Child processes import nothing from the current folder and see no token that they do not need."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.hub_server import HubServer
from helpers.paths import SOURCE
from mmquant.convert.files.child import SAFE_PATH, environment
from mmquant.convert.hub.http import Retry
from mmquant.convert.hub.store import FetchOptions, hub_source
from mmquant.runs.llmc import find_python

TRAP = """import json, os, sys
open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "caught"), "w").write(json.dumps(dict(os.environ)))
"""
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules have the names of libraries, and an environment full of secrets."""
    for name in ("huggingface_hub", "llmcompressor", "json", "compressed_tensors", "mmquant"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(tmp_path / "own")]))
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    return tmp_path


def test_the_environment_has_no_secrets_and_no_current_folder(trap: Path) -> None:
    code = "import json, os, sys; print(json.dumps([sys.path, dict(os.environ)]))"
    done = subprocess.run(
        [sys.executable, SAFE_PATH, "-c", code], env=environment({"X": "1"}), capture_output=True, text=True, check=True
    )
    path, seen = json.loads(done.stdout)
    assert not {"", ".", str(trap)} & set(path)
    assert str(trap / "own") in path
    assert seen["X"] == "1"
    assert seen["PATH"] == os.environ["PATH"]
    assert "secret" not in seen.values()
    assert not (trap / "caught").exists()


def test_xet_runs_nothing_of_the_current_folder(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        hub.use(monkeypatch, trap)
        hub.seed("org/m", {"x.safetensors": bytes(2000)})
        options = FetchOptions(work=trap / "w", transport="xet", retry=Retry(1, 0.01, 0.02, 20.0))
        store = hub_source("hf:org/m", options)
        assert store.path("x.safetensors").read_bytes() == bytes(2000)
        store.close()
    assert not (trap / "caught").exists()


def test_llmcompressor_is_not_looked_for_in_the_current_folder(trap: Path) -> None:
    with pytest.raises(ValueError, match="has no llmcompressor"):
        find_python()
    assert not (trap / "caught").exists()


@pytest.mark.parametrize("package", ["commands", "runs", "calibration", "convert", "quantize", "mmquant"])
def test_every_child_process_is_started_this_way(package: str) -> None:
    """Every call of subprocess in the product names its environment, and Python gets -P."""
    for path in (SOURCE / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess."):
                assert "env" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
                assert "SAFE_PATH" in text, path
