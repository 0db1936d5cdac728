"""Hidden states in RAM and on disk are equal; windows hold the tokenizer's tokens in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmquant.calibration.model.hidden import HiddenStates, load_states, save_states
from mmquant.calibration.text.tokenizer import load_tokenizer, windows
from mmquant.convert.open import open_native
from mmquant.errors import InputError


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


def test_saved_states_are_loaded_with_the_same_bits_and_other_tensors_beside_them(tmp_path: Path) -> None:
    states = {name: HiddenStates(19, 3, 4) for name in ("reference", "written")}
    for found in states.values():
        found.put(0, torch.randn(19, 3, 4))
    sums = {f"layers.{i}": torch.randn(i + 1, 2, dtype=torch.float64) for i in range(12)}
    save_states(tmp_path / "s", states, sums)
    again = {name: HiddenStates(19, 3, 4, 0, tmp_path) for name in states}
    found = load_states(tmp_path / "s", again)
    assert found.keys() == sums.keys()
    assert all(torch.equal(found[name], value) for name, value in sums.items())
    assert all(torch.equal(again[name].all(), value.all()) for name, value in states.items())
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-4], lambda data: b"", lambda data: b"x" * len(data)])
def test_damaged_states_are_one_line_that_names_the_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    states, path = HiddenStates(5, 3, 4), tmp_path / "s"
    states.put(0, torch.randn(5, 3, 4))
    states.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"^{path}: .*damaged; delete it") as raised:
        HiddenStates(5, 3, 4).load(path, "delete it to begin again")
    assert "\n" not in str(raised.value)
    assert path.exists()


def test_states_of_another_shape_are_refused(tmp_path: Path) -> None:
    states = HiddenStates(5, 3, 4)
    states.put(0, torch.randn(5, 3, 4))
    states.save(tmp_path / "s")
    with pytest.raises(InputError, match=r"hidden of shape \(5, 3, 4\), expected \(4, 3, 4\)"):
        HiddenStates(4, 3, 4).load(tmp_path / "s")
