"""GGUF metadata of a minimax-m2 file: keys of llama.cpp's converter, and the origin of the file.

Source: llama.cpp conversion/base.py, conversion/minimax.py, gguf-py/gguf/vocab.py (facts only). The
architecture chooses the pre-tokenizer, not a hash of the vocabulary, so any MiniMax-M2 vocabulary tokenizes right.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_VERSION
from gguf.utility import size_label

from mmquant.errors import InputError

from ..carried import read_object
from ..chat_templates import DEFAULT, chat_templates
from ..files.parse import are, is_list, is_object, parse_yaml, short, take, take_list, take_map
from ..hub.hubs import DEFAULT_HUB, HUBS
from ..models.geometry import Geometry
from ..models.gguf import architecture_keys
from ..naming import short_name
from ..source import Source
from ..special_tokens import special_tokens
from .tokenizer import SPECIAL_TOKENS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp
IMATRIX_TEXT_LIMIT = 127  # characters that llama-quantize keeps of a file or data-set name


@dataclass(frozen=True)
class Value:
    """One value of the metadata: `kind` is str, bool, u16, u32, u64, i32, f32, or one in brackets for an array."""

    kind: str
    data: Any

    def packed(self) -> bytes:
        """Type id and value, little endian, as GGUF v3 stores them."""
        if self.kind.startswith("["):
            element = self.kind.strip("[]")
            if element == "str":
                body = b"".join(pack_string(str(item)) for item in self.data)
            else:
                body = struct.pack(f"<{len(self.data)}{_FORMAT[element]}", *self.data)
            return struct.pack("<IIQ", _ID["array"], _ID[element], len(self.data)) + body
        return struct.pack("<I", _ID[self.kind]) + _scalar(self.kind, self.data)


Metadata = dict[str, Value]
_ID = {"u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "array": 9, "u64": 10}
_FORMAT = {"u16": "H", "u32": "I", "i32": "i", "f32": "f", "bool": "?", "u64": "Q"}


def pack_string(text: str) -> bytes:
    """A GGUF string: byte length as u64, then UTF-8. InputError for half of a character."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"metadata: {text[:40]!r} has a lone surrogate at {error.start}, expected text") from None
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: str, value: object) -> bytes:
    return pack_string(str(value)) if kind == "str" else struct.pack(f"<{_FORMAT[kind]}", value)


@dataclass(frozen=True)
class Importance:
    """What the quantize.imatrix.* keys say of the calibration behind a file."""

    file: str
    dataset: str
    entries: int
    chunks: int


def model_metadata(source: Source, name: str, file_type: int, importance: Importance | None) -> Metadata:
    """All keys of the first file, without split.*: general, architecture, tokenizer, importance, provenance.

    Raises ValueError when the tokenizer is missing or does not fit the model's vocabulary.
    """
    metadata = {
        **general_keys(source, name),
        **{key: Value(*value) for key, value in architecture_keys(source.geometry).items()},
        "general.file_type": Value("u32", file_type),
        "general.quantization_version": Value("u32", GGML_QUANT_VERSION),
        **tokenizer_keys(source),
    }
    if importance is not None:
        metadata |= {
            "quantize.imatrix.file": Value("str", importance.file[:IMATRIX_TEXT_LIMIT]),
            "quantize.imatrix.dataset": Value("str", importance.dataset[:IMATRIX_TEXT_LIMIT]),
            "quantize.imatrix.entries_count": Value("u32", importance.entries),
            "quantize.imatrix.chunks_count": Value("u32", importance.chunks),
        }
    return metadata


def place_of(source: Source) -> str:
    """Where a source comes from, without this machine's paths: hf:ORG/NAME@COMMIT, or a folder's name."""
    origin = source.origin
    if origin.repo:
        return f"{origin.hub}:{origin.repo}" + (f"@{origin.revision}" if origin.revision else "")
    return short_name(source.label)


def provenance_keys(source: Source, settings: dict[str, str]) -> Metadata:
    """mmquant.*: the version, the source with its fingerprint, and the settings that decide the bytes."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("mmquant")
    except PackageNotFoundError:  # a bare checkout
        release = "0"
    label = place_of(source)
    fixed = {"version": release, "source": f"{label}@{source.fingerprint[:16]}"}
    return {f"mmquant.{key}": Value("str", value) for key, value in {**fixed, **settings}.items()}


def general_keys(source: Source, name: str) -> Metadata:
    """general.*: name, size, and from the source's model card its licence, tags, languages and base model."""
    keys: dict[str, Value] = {
        "general.architecture": Value("str", source.geometry.architecture.gguf.arch),
        "general.type": Value("str", "model"),
        "general.name": Value("str", name),
        "general.size_label": Value("str", geometry_size(source.geometry)),
    }
    card = card_fields(source.small_file("README.md"))
    for field, key in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(card.get(field), str):
            keys[f"general.{key}"] = Value("str", card[field])
    keys |= _base_model(source, card)
    tags = _texts(card.get("tags")) + _texts(card.get("pipeline_tag"))
    if tags:
        keys["general.tags"] = Value("[str]", tags)
    if languages := _texts(card.get("language")):
        keys["general.languages"] = Value("[str]", languages)
    return keys


def card_fields(card: bytes | None) -> dict[str, Any]:
    """The YAML head of a model card, empty when there is none or it is not a mapping."""
    match = re.match(rb"---\r?\n(.*?)\r?\n---", card or b"", re.DOTALL)
    if match is None:
        return {}
    try:
        fields: object = parse_yaml(match.group(1), "README.md")
    except InputError:
        return {}
    return fields if is_object(fields) else {}


def _texts(value: object) -> list[str]:
    values = value if is_list(value) else [value]
    return [item for item in values if isinstance(item, str)]


def _base_model(source: Source, card: dict[str, Any]) -> Metadata:
    """general.base_model.*: what the card names, or the hub repository that was read."""
    origin = source.origin
    named = [name for name in _texts(card.get("base_model")) if name.count("/") == 1]
    repositories = [origin.repo] if origin.repo else named
    if not repositories:
        return {}
    hub = HUBS.get(origin.hub, DEFAULT_HUB) if origin.repo else DEFAULT_HUB
    keys = {"general.base_model.count": Value("u32", len(repositories))}
    for index, repository in enumerate(repositories):
        organization, _, model = repository.partition("/")
        prefix = f"general.base_model.{index}."
        keys[prefix + "name"] = Value("str", model.replace("-", " "))
        keys[prefix + "organization"] = Value("str", organization)
        keys[prefix + "repo_url"] = Value("str", hub.page_url(hub.endpoint, repository))
    return keys


def tokenizer_keys(source: Source) -> Metadata:
    """tokenizer.*: tokens, types, merges, special token ids and the chat template."""
    where = f"{source.label}: tokenizer.json"
    tokenizer, settings = read_object(source, "tokenizer.json"), read_object(source, "tokenizer_config.json")
    model = take(tokenizer, "model", dict, where, {})
    if model.get("type") != "BPE":
        raise InputError(f"{where} has no BPE vocabulary")
    vocab, added = take_map(model, "vocab", int, where), take_list(tokenizer, "added_tokens", dict, where, [])
    tokens, types = _tokens(source, vocab, added)
    merges = take(model, "merges", list, where, [])
    keys = {
        "tokenizer.ggml.model": Value("str", "gpt2"),
        "tokenizer.ggml.pre": Value("str", source.geometry.architecture.gguf.pre),
        "tokenizer.ggml.tokens": Value("[str]", tokens),
        "tokenizer.ggml.token_type": Value("[i32]", types),
        "tokenizer.ggml.merges": Value("[str]", [_merge(merge, where) for merge in merges]),
    }
    ids = {token: index for index, token in enumerate(tokens)}
    keys |= _special_ids(source, ids, len(tokens))
    for kind in ("bos", "eos", "sep"):
        if isinstance(settings.get(f"add_{kind}_token"), bool):
            keys[f"tokenizer.ggml.add_{kind}_token"] = Value("bool", settings[f"add_{kind}_token"])
    return keys | _templates(source)


def _merge(merge: object, where: str) -> str:
    """One merge as "a b" from either form of tokenizer.json; a blank inside a part becomes U+0120 (byte-level BPE)."""
    if isinstance(merge, str):
        return merge
    if not is_list(merge) or not are(merge, str):
        raise InputError(f"{where}: the merge {short(merge)}, expected two tokens")
    return " ".join(part.replace(" ", "\u0120") for part in merge)


def _tokens(source: Source, vocab: dict[str, int], added: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Text and type of every id up to the model's vocabulary; unnamed ids are unused padding."""
    size = source.geometry.vocab
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    where = f"{source.label}: tokenizer.json"
    entries = [(index, text, NORMAL) for text, index in vocab.items()]
    for token in added:
        content = take(token, "content", str, where)
        special = token.get("special") or _looks_special(content)
        entries.append((take(token, "id", int, where), content, CONTROL if special else USER_DEFINED))
    for index, text, kind in entries:
        if not 0 <= index < size:
            raise InputError(f"{source.label}: tokenizer.json names id {index}, config.json has a vocabulary of {size}")
        tokens[index], types[index] = text, kind
    return tokens, types


def _looks_special(text: str) -> bool:
    """Added tokens that are control tokens though nobody said so (llama.cpp's rule)."""
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or bool(
        re.fullmatch(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>", text)
    )


def _special_ids(source: Source, ids: dict[str, int], size: int) -> Metadata:
    """Ids of bos, eos, ... that the vocabulary has."""
    found = special_tokens(source, ids)
    return {
        f"tokenizer.ggml.{name}_token_id": Value("u32", found[kind].id)
        for kind, name in SPECIAL_TOKENS.items()
        if kind in found and (found[kind].id or 0) < size and found[kind].id is not None
    }


def _templates(source: Source) -> Metadata:
    """The chat template, and named ones as gguf-py writes them."""
    keys: dict[str, Value] = {}
    names: list[str] = []
    for name, template in chat_templates(source).items():
        if name == DEFAULT:
            keys["tokenizer.chat_template"] = Value("str", template.text)
        else:
            names.append(re.sub(r"[^A-Za-z0-9]", "_", name))
            keys[f"tokenizer.chat_template.{names[-1]}"] = Value("str", template.text)
    return keys | ({"tokenizer.chat_templates": Value("[str]", names)} if names else {})


def split_keys(part: int, parts: int, tensors: int) -> Metadata:
    """split.*, in every file of a set of several."""
    return {
        "split.no": Value("u16", part),
        "split.count": Value("u16", parts),
        "split.tensors.count": Value("i32", tensors),
    }


def geometry_size(geometry: Geometry) -> str:
    """What general.size_label says, such as 256x4.9B."""
    g = geometry
    return size_label(g.parameters, g.parameters - g.expert_weights, g.expert_weights // g.experts, g.experts)
