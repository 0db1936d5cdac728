"""Check that a candidate and its reference are the same model and share their tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from mmquant.errors import InputError

from ...convert.files.parse import parse_json, take, take_list, take_map
from ...convert.models.geometry import Geometry
from ...convert.models.rope import RopeScaling, same_scaling
from ...convert.source import Source


@dataclass(frozen=True)
class Vocabulary:
    """What decides how text becomes ids: token by id, merges in order, the pre-tokenizer's description."""

    tokens: dict[int, str]
    merges: list[str]
    splitting: str

    @property
    def digest(self) -> str:
        """SHA-256 of tokens, merges and splitting."""
        whole = [sorted(self.tokens.items()), self.merges, self.splitting]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def read_vocabulary(source: Source) -> Vocabulary | None:
    """The vocabulary of a source's tokenizer.json; None when it has none, ValueError when it is damaged."""
    data = source.small_file("tokenizer.json")
    if data is None:
        return None
    try:
        whole = parse_json(data, f"{source.label}: tokenizer.json")
        where = f"{source.label}: tokenizer.json"
        tokens = {number: token for token, number in take_map(whole["model"], "vocab", int, where).items()}
        added = take_list(whole, "added_tokens", dict, where, [])
        tokens |= {take(token, "id", int, where): take(token, "content", str, where) for token in added}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"].get("merges") or []]
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{source.label}: tokenizer.json is damaged, expected a BPE vocabulary") from None
    return Vocabulary(tokens, merges, json.dumps(whole.get("pre_tokenizer"), sort_keys=True))


def tokenizer_digest(source: Source) -> str | None:
    """SHA-256 of what the tokenizer does, equal for a folder and its GGUF; None when there is none."""
    found = read_vocabulary(source)
    return None if found is None else found.digest


def check_same_tokenizer(reference: Source, candidate: Source) -> None:
    """ValueError naming what two tokenizers differ in; nothing when the candidate carries none."""
    own, base = read_vocabulary(candidate), read_vocabulary(reference)
    if own is None or base is None:
        return
    if len(own.tokens) != len(base.tokens):
        counts = f"{len(own.tokens)} tokens, the reference has {len(base.tokens)}"
        raise InputError(f"{candidate.label}: a tokenizer of {counts}: another tokenizer")
    for number in sorted(own.tokens.keys() | base.tokens.keys()):
        found, expected = own.tokens.get(number), base.tokens.get(number)
        if found != expected:
            raise InputError(
                f"{candidate.label}: token {number} is {found!r}, the reference's tokenizer has {expected!r}"
            )
    for number, (found, expected) in enumerate(zip(own.merges, base.merges, strict=False)):
        if found != expected:
            raise InputError(
                f"{candidate.label}: merge {number} is {found!r}, the reference's tokenizer has {expected!r}"
            )
    if len(own.merges) != len(base.merges) or own.splitting != base.splitting:
        raise InputError(f"{candidate.label}: its tokenizer splits text in another way than the reference's")


def _same(own: object, base: object) -> bool:
    """Whether two values of a geometry agree, numbers up to float32."""
    if isinstance(own, RopeScaling | None) and isinstance(base, RopeScaling | None):
        return same_scaling(own, base)
    if isinstance(own, float) and isinstance(base, float):
        return abs(own - base) <= 1e-6 * abs(base)
    return own == base


def check_same_model(reference: Geometry, candidate: Source) -> None:
    """Refuse a candidate of another model: ValueError naming the first size that differs."""
    own, base = candidate.geometry.rope_scaling, reference.rope_scaling
    if not same_scaling(own, base):
        raise InputError(f"{candidate.label}: rope_scaling is {own}, the reference has {base}: another model")
    for name in Geometry.__dataclass_fields__:
        if name in ("max_context", "rope_scaling"):
            continue
        own, base = getattr(candidate.geometry, name), getattr(reference, name)
        if name == "experts" and own < base:  # a pruned one
            continue
        if not _same(own, base):
            raise InputError(f"{candidate.label}: {name} is {own}, the reference has {base}: another model")
