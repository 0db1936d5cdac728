"""Rebuild tokenizer.json from GGUF metadata: byte-level BPE with the architecture's pre-tokenizer."""

from __future__ import annotations

import json
from typing import Any

from ..chat_templates import DEFAULT
from ..files.parse import is_list
from ..models.gguf import GgufFacts

# Kinds of special tokens as GGUF spells them.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def tokenizer_json(metadata: dict[str, Any], facts: GgufFacts) -> bytes | None:
    """A tokenizer.json that splits text as the file's tokenizer does; None for a file without BPE of that sort."""
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not is_list(tokens) or not is_list(merges) or metadata.get("tokenizer.ggml.pre") != facts.pre:
        return None
    if not is_list(kinds) or len(kinds) != len(tokens):
        kinds = [NORMAL] * len(tokens)
    both = [(i, str(token), kind) for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))]
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for i, token, kind in both
        if kind in (CONTROL, USER_DEFINED)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": facts.pattern}, "behavior": "Isolated", "invert": False}
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token, kind in both if kind == NORMAL},
        "merges": [str(merge).split(" ", 1) for merge in merges],
    }
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level | {"use_regex": True},
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False).encode()


def tokenizer_config(metadata: dict[str, Any]) -> bytes:
    """A tokenizer_config.json with the file's special tokens and chat templates."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if is_list(tokens) else []
    found: dict[str, Any] = {}
    for kind, name in SPECIAL_TOKENS.items():
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[f"{kind}_token"] = str(tokens[index])
    names = metadata.get("tokenizer.chat_templates")
    keys = {DEFAULT: "tokenizer.chat_template"}
    keys |= {str(name): f"tokenizer.chat_template.{name}" for name in (names if is_list(names) else [])}
    texts = {name: text for name, key in keys.items() if isinstance(text := metadata.get(key), str)}
    found["chat_template"] = [{"name": name, "template": text} for name, text in texts.items()]
    return json.dumps(found).encode()
