"""Text to token windows with the checkpoint's own tokenizer."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmquant.errors import InputError

from ...convert.source import Source


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of tokenizer.json; ValueError when the source carries none."""
    data = source.small_file("tokenizer.json")
    if data is None:
        raise InputError(f"{source.label}: tokenizer.json is missing")
    return Tokenizer.from_str(data.decode())


def windows(text: str, tokenizer: Tokenizer, context: int, count: int | None = None) -> Tensor:
    """Consecutive windows of `context` tokens -> [W, context] int64; the ragged rest is dropped, no BOS is added.

    Raises ValueError when the text is shorter than one window.
    """
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    whole = len(ids) // context
    if whole == 0:
        raise InputError(f"text: {len(ids)} tokens, expected at least one window of {context}")
    whole = whole if count is None else min(whole, count)
    return ids[: whole * context].view(whole, context)
