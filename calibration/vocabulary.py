"""Whether a candidate speaks the reference's tokens: the check before two models are compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..convert.source import Source


def tokenizer_digest(source: Source) -> str:
    """SHA-256 of tokenizer.json; ValueError when the source carries none."""
    data = source.small_file("tokenizer.json")
    if data is None:
        raise ValueError(f"{source.label}: tokenizer.json is missing")
    return hashlib.sha256(data).hexdigest()


def vocabulary(source: Source) -> dict[int, str] | None:
    """Token by id: of tokenizer.json, or of a GGUF file's own list (its padding left out); None without either."""
    own = getattr(source, "vocabulary", None)
    if own is not None:
        return own
    data = source.small_file("tokenizer.json")
    return None if data is None else _table(data, source.label)


def _table(data: bytes, label: str) -> dict[int, str]:
    try:
        whole: dict[str, Any] = json.loads(data)
        table = {int(number): token for token, number in whole["model"]["vocab"].items()}
        table |= {int(added["id"]): added["content"] for added in whole.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{label}: tokenizer.json is damaged, expected a BPE vocabulary") from None
    return table


def check_same_tokenizer(reference: Source, candidate: Source) -> None:
    """ValueError naming the first token on which two models differ; nothing when the candidate carries no tokenizer."""
    mine, theirs = vocabulary(candidate), vocabulary(reference)
    if mine is None or theirs is None or mine == theirs:
        return
    if len(mine) != len(theirs):
        raise ValueError(f"{candidate.label}: a tokenizer of {len(mine)} tokens, the reference has {len(theirs)}")
    first = min(number for number in mine.keys() | theirs.keys() if mine.get(number) != theirs.get(number))
    found, wanted = mine.get(first), theirs.get(first)
    raise ValueError(f"{candidate.label}: token {first} is {found!r}, the reference's tokenizer has {wanted!r}")
