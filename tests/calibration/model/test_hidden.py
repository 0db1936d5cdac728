"""Hidden states in RAM and on disk are equal; windows hold the tokenizer's tokens in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmquant.calibration.model.hidden import HiddenStates
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.open import open_native


@pytest.mark.parametrize("ram_limit", [1 << 20, 0])
def test_batches_are_read_advanced_and_put_back(ram_limit: int, tmp_path: Path) -> None:
    states = HiddenStates(5, 3, 4, ram_limit, tmp_path)
    assert states.on_disk == (ram_limit == 0)
    values = torch.randn(5, 3, 4)
    states.put(0, values)
    for start, batch in states.batches(2):
        assert torch.equal(batch, values[start : start + 2])
        states.put(start, batch + 1)
    assert torch.equal(states.all(), values + 1)
    assert list(tmp_path.iterdir()) == []  # a killed process leaves no file


def test_windows_are_consecutive_tokens() -> None:
    tokenizer = load_tokenizer(open_native("demo"))
    text = "In the beginning was the Word. 起初有道。\n" * 40
    tokens = windows(text, tokenizer, 32)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens.flatten().tolist() == ids[: tokens.numel()]
    assert windows(text, tokenizer, 32, 2).shape == (2, 32)


def test_a_text_shorter_than_a_window() -> None:
    with pytest.raises(ValueError, match="expected at least one window of 64"):
        windows("short", load_tokenizer(open_native("demo")), 64)
