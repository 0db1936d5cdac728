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
    mine, theirs = read_vocabulary(candidate), read_vocabulary(reference)
    if mine is None or theirs is None:
        return
    if len(mine.tokens) != len(theirs.tokens):
        counts = f"{len(mine.tokens)} tokens, the reference has {len(theirs.tokens)}"
        raise InputError(f"{candidate.label}: a tokenizer of {counts}: another tokenizer")
    for number in sorted(mine.tokens.keys() | theirs.tokens.keys()):
        found, wanted = mine.tokens.get(number), theirs.tokens.get(number)
        if found != wanted:
            raise InputError(
                f"{candidate.label}: token {number} is {found!r}, the reference's tokenizer has {wanted!r}"
            )
    for number, (found, wanted) in enumerate(zip(mine.merges, theirs.merges, strict=False)):
        if found != wanted:
            raise InputError(
                f"{candidate.label}: merge {number} is {found!r}, the reference's tokenizer has {wanted!r}"
            )
    if len(mine.merges) != len(theirs.merges) or mine.splitting != theirs.splitting:
        raise InputError(f"{candidate.label}: its tokenizer splits text in another way than the reference's")


def _same(mine: object, theirs: object) -> bool:
    """Whether two values of a geometry agree, numbers up to float32."""
    if isinstance(mine, RopeScaling | None) and isinstance(theirs, RopeScaling | None):
        return same_scaling(mine, theirs)
    if isinstance(mine, float) and isinstance(theirs, float):
        return abs(mine - theirs) <= 1e-6 * abs(theirs)
    return mine == theirs


def check_same_model(reference: Geometry, candidate: Source) -> None:
    """Refuse a candidate of another model: ValueError naming the first size that differs."""
    mine, theirs = candidate.geometry.rope_scaling, reference.rope_scaling
    if not same_scaling(mine, theirs):
        raise InputError(f"{candidate.label}: rope_scaling is {mine}, the reference has {theirs}: another model")
    for name in Geometry.__dataclass_fields__:
        if name in ("max_context", "rope_scaling"):
            continue
        mine, theirs = getattr(candidate.geometry, name), getattr(reference, name)
        if name == "experts" and mine < theirs:  # a pruned one
            continue
        if not _same(mine, theirs):
            raise InputError(f"{candidate.label}: {name} is {mine}, the reference has {theirs}: another model")
