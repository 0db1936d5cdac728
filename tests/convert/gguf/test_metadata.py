"""Metadata equals gguf-py's reading of the same tokenizer and the keys of llama.cpp's converter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import pytest

from mmquant.convert.checkpoints.store import Origin
from mmquant.convert.gguf.metadata import Importance, Value, card_fields, model_metadata, provenance_keys
from mmquant.convert.models.minimax_m2 import Geometry
from mmquant.convert.open import demo_folder, open_source

M27 = Geometry(62, 3072, 48, 8, 128, 256, 8, 1536, 200064, 64, 5e6, 1e-6, 196608)


@dataclass
class Files:
    """A source that has nothing but small files."""

    files: dict[str, bytes]
    label: str = "folder"
    geometry: Geometry = M27
    config: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = "0" * 64
    origin: Origin = field(default_factory=Origin)

    def small_file(self, name: str) -> bytes | None:
        return self.files.get(name)

    def file_names(self) -> list[str]:
        return list(self.files)


def tiny(added: list[dict[str, Any]], config: dict[str, Any] | None = None, **files: bytes) -> Files:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"], "a b"]},
        "added_tokens": added,
    }
    settings = {"eos_token": {"content": "<end>"}, **(config or {})}
    named = {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    return Files(named | files, geometry=replace(M27, vocab=8))


def test_demo_has_the_converters_keys() -> None:
    source = open_source("demo")
    importance = Importance("imatrix.gguf", "x" * 200, 28, 200)
    keys = model_metadata(source, "demo", 15, importance) | provenance_keys(source, {"effort": "default"})
    data = {key: value.data for key, value in keys.items()}
    vocab = gguf.SpecialVocab(demo_folder(), load_merges=True)
    assert data["tokenizer.ggml.merges"] == vocab.merges
    assert data["tokenizer.chat_template"] == vocab.chat_template
    for kind, index in vocab.special_token_ids.items():
        assert data[getattr(gguf.Keys.Tokenizer, f"{kind.upper()}_ID")] == index
    assert data["tokenizer.ggml.pre"] == "minimax-m2"
    assert len(data["tokenizer.ggml.tokens"]) == source.geometry.vocab == len(data["tokenizer.ggml.token_type"])
    assert data["general.quantization_version"] == 2
    assert len(data["quantize.imatrix.dataset"]) == 127
    assert data["mmquant.source"] == f"demo@{source.fingerprint[:16]}"
    assert data["mmquant.effort"] == "default"
    for name, expected in {"expert_gating_func": 2, "rope.dimension_count": 32, "block_count": 4}.items():
        assert data[f"minimax-m2.{name}"] == expected


def test_size_label_of_m27() -> None:
    source = replace(tiny([]), geometry=M27)
    assert model_metadata(source, "x", 0, None)["general.size_label"].data == "256x4.9B"  # type: ignore[arg-type]


def test_tokens_of_every_kind() -> None:
    added = [
        {"id": 3, "content": "<end>", "special": True},
        {"id": 4, "content": "<think>", "special": False},
        {"id": 5, "content": "<|odd|>", "special": False},
    ]
    keys = model_metadata(tiny(added), "x", 0, None)  # type: ignore[arg-type]
    assert keys["tokenizer.ggml.tokens"].data == ["a", "b", "ab", "<end>", "<think>", "<|odd|>", "[PAD6]", "[PAD7]"]
    assert keys["tokenizer.ggml.token_type"].data == [1, 1, 1, 3, 4, 3, 5, 5]
    assert keys["tokenizer.ggml.merges"].data == ["a b", "a b"]
    assert keys["tokenizer.ggml.eos_token_id"] == Value("u32", 3)
    assert "tokenizer.ggml.bos_token_id" not in keys


def test_the_chat_templates_file_wins_as_in_transformers() -> None:
    source = tiny([], None, **{"chat_template.jinja": "{{ é }}".encode()})
    assert model_metadata(source, "x", 0, None)["tokenizer.chat_template"].data == "{{ é }}"  # type: ignore[arg-type]
    source = tiny([], {"chat_template": "inner"}, **{"chat_template.jinja": b"outer"})
    assert model_metadata(source, "x", 0, None)["tokenizer.chat_template"].data == "outer"  # type: ignore[arg-type]


def test_model_card_and_hub_name_licence_and_base_model() -> None:
    card = b"---\nlicense: other\nlicense_name: modified-mit\nlanguage: [en, zh]\ntags:\n- moe\n---\n# Model\n"
    source = replace(tiny([], None, **{"README.md": card}), origin=Origin("hf", "MiniMaxAI/MiniMax-M2.7", "abc"))
    keys = {key: value.data for key, value in model_metadata(source, "x", 0, None).items()}  # type: ignore[arg-type]
    assert keys["general.license"] == "other"
    assert keys["general.license.name"] == "modified-mit"
    assert keys["general.languages"] == ["en", "zh"]
    assert keys["general.tags"] == ["moe"]
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.organization"] == "MiniMaxAI"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/MiniMaxAI/MiniMax-M2.7"


@pytest.mark.parametrize("card", [None, b"", b"# no head", b"---\n: [\n---\n", b"---\n- a\n---\n"])
def test_cards_without_fields(card: bytes | None) -> None:
    assert card_fields(card) == {}


def test_bad_tokenizers() -> None:
    with pytest.raises(ValueError, match=r"id 8, config\.json has a vocabulary of 8"):
        model_metadata(tiny([{"id": 8, "content": "x", "special": True}]), "x", 0, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no BPE vocabulary"):
        model_metadata(Files({}), "x", 0, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not JSON"):
        model_metadata(Files({"tokenizer.json": b"{"}), "x", 0, None)  # type: ignore[arg-type]
