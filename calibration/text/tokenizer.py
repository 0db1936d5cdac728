"""Tokenize text into windows with the checkpoint's own tokenizer."""

from __future__ import annotations

import re
from importlib.metadata import version

import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmquant.errors import InputError

from ...convert.carried import parse_object
from ...convert.source import Source


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of tokenizer.json, as it splits text.

    Without the truncation, padding and dropout that were saved with it: they are settings of whoever trained on it and
    would cut, fill or scatter documents. InputError when the source carries none, or one that the installed tokenizers
    cannot read.
    """
    data = source.small_file("tokenizer.json")
    if data is None:
        raise InputError(f"{source.label}: tokenizer.json is missing")
    where = f"{source.label}: tokenizer.json"
    parse_object(where, data)
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8-sig"))
    except Exception as error:  # the library raises no narrower type
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise InputError(
            f"{where}: tokenizers {version('tokenizers')} cannot read it ({reason}); "
            "is it damaged, or written by a newer version?"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


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
