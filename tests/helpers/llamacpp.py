"""Load GGUF files with a real llama.cpp: logits, tokens, perplexity.

`logits`, `tokens` and `perplexity` open the file with the library of the `llamacpp` extra; a test that uses them starts
with `llamacpp.need()`, which skips where the extra is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mmquant.runs.evaluation.llamacpp import LlamaModel, available


def need() -> None:
    """Skip the calling test where the wheel with llama.cpp is not installed."""
    if not available():
        pytest.skip("needs the llamacpp extra")


def tokens(path: Path, text: str, special: bool = True) -> list[int]:
    """llama.cpp's token ids of `text` by the tokenizer inside the file."""
    with LlamaModel(path, context=64) as model:
        return model.tokenize(text, special)


def logits(
    path: Path, windows: Sequence[Sequence[int]], context: int = 512, exact: bool = False
) -> NDArray[np.float32]:
    """Logits [W, T, V] float32 of equally long windows, each from an empty cache (`exact`: attention in float32)."""
    with LlamaModel(path, context=context, exact=exact) as model:
        return np.stack([model.logits(list(window)) for window in windows])


def log_probabilities(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """log softmax over the last axis, in float64."""
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def perplexity(path: Path, windows: Sequence[Sequence[int]], first: int = 0, context: int = 512) -> float:
    """exp of the mean negative log-likelihood of the tokens after position `first` of each window."""
    nll: list[NDArray[np.float64]] = []
    with LlamaModel(path, context=context) as model:
        for window in windows:
            ids = np.asarray(list(window))
            logp = log_probabilities(model.logits(ids.tolist(), first))[:-1]
            nll.append(-logp[np.arange(len(logp)), ids[first + 1 :]])
    return float(np.exp(np.concatenate(nll).mean()))
