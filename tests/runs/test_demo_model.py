"""The bundled checkpoint is whole and is the one that its record describes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest

from helpers.paths import PACKAGE, ROOT

DEMO = PACKAGE / "data" / "demo"
RECORD = ROOT / "docs" / "demo-model"
SHARDS = {
    "model-00001-of-00002.safetensors": "cc87e6028c15bf5b0308d2b5a37ac3a4f756b061f74f19d931cc4b15f5cd5e0d",
    "model-00002-of-00002.safetensors": "96af6328cec6b4ac178ceb50d24455b7759bde57a0239515180916bcad355e73",
}


@pytest.fixture(scope="module")
def assemble() -> ModuleType:
    """docs/demo-model/assemble.py, imported from where it lies (it imports its neighbour `model`)."""
    sys.path.insert(0, str(RECORD))
    try:
        spec = importlib.util.spec_from_file_location("demo_assemble", RECORD / "assemble.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(RECORD))
        sys.modules.pop("model", None)


def test_shards_are_the_trained_ones() -> None:
    for name, digest in SHARDS.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest, name


def test_record_writes_the_shipped_configuration(assemble: ModuleType) -> None:
    shape = assemble.Shape()
    assert json.loads((DEMO / "config.json").read_text()) == assemble.config(shape)
    assert json.loads((DEMO / "tokenizer_config.json").read_text()) == assemble.tokenizer_config()
    assert json.loads((DEMO / "generation_config.json").read_text()) == assemble.generation_config(shape)
    assert (DEMO / "chat_template.jinja").read_text() == assemble.CHAT_TEMPLATE


def test_a_licence_and_a_description_travel_with_it() -> None:
    assert "Apache License" in (DEMO / "LICENSE").read_text()
    assert "trained from scratch" in (DEMO / "README.md").read_text()
