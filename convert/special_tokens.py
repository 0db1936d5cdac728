"""Find a model's special tokens, by the same rules for every command and format.

By text: tokenizer_config.json, then special_tokens_map.json, each as a string or an object with `content`. Else by
number: generation_config.json (the first of a list), then config.json. Empty and null are absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .carried import read_object
from .files.parse import is_list, is_object
from .source import Source

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class SpecialToken:
    """A token's text and id; one of them may be unknown."""

    text: str | None
    id: int | None


def special_tokens(source: Source, ids: Mapping[str, int] | None = None) -> dict[str, SpecialToken]:
    """Special tokens by kind (bos, eos, ...), as far as the model names them. `ids`: ids by text, when known."""
    ids = token_ids(read_object(source, "tokenizer.json")) if ids is None else ids
    texts = {index: text for text, index in ids.items()}
    named = [read_object(source, name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    numbered = [read_object(source, "generation_config.json"), source.config]
    found: dict[str, SpecialToken] = {}
    for kind in KINDS:
        text = next((text for file in named if (text := _text(file.get(f"{kind}_token"))) is not None), None)
        number = ids.get(text) if text is not None else None
        if number is None:
            given = (_number(file.get(f"{kind}_token_id")) for file in numbered)
            number = next((n for n in given if n is not None), None)
        if text is None and number is not None:
            text = texts.get(number)
        if text is not None or number is not None:
            found[kind] = SpecialToken(text, number)
    return found


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids by text of a tokenizer.json; what has no such form is left out."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if is_object(model) else None
    pairs: list[tuple[Any, Any]] = list(vocab.items()) if is_object(vocab) else []
    pairs += [(t.get("content"), t.get("id")) for t in (added if is_list(added) else []) if is_object(t)]
    return {text: index for text, index in pairs if isinstance(text, str) and _number(index) is not None}


def _text(value: object) -> str | None:
    value = value.get("content") if is_object(value) else value
    return value if isinstance(value, str) and value else None


def _number(value: object) -> int | None:
    value = value[0] if is_list(value) and value else value
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
