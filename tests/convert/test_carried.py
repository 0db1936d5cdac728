"""Files that an artifact takes over are read before anything is written, and refused when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmquant.calibration.text.tokenizer import load_tokenizer
from mmquant.convert.carried import carried_files, parse_object
from mmquant.convert.files.lfs import POINTER
from mmquant.convert.folder.fp8 import Fp8Variant
from mmquant.convert.open import demo_folder, open_native
from mmquant.convert.source import CARRIED_FILES
from mmquant.errors import InputError
from mmquant.runs.folder import write_folder
from mmquant.runs.native import write_native

TEXT = "The tokenizer splits these words, one after another. " * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder(), tmp_path / "model"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), "utf-8")


def test_saved_truncation_padding_and_dropout_do_not_touch_the_text(folder: Path) -> None:
    plain = load_tokenizer(open_native(folder)).encode(TEXT, add_special_tokens=False).ids
    truncation = {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 2048}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3}
    padding |= {"pad_type_id": 0, "pad_token": "!"}
    edit(folder / "tokenizer.json", lambda data: data.update(truncation=truncation, padding=padding))
    edit(folder / "tokenizer.json", lambda data: data["model"].update(dropout=0.9))
    for _ in range(3):
        tokenizer = load_tokenizer(open_native(folder))
        assert tokenizer.encode(TEXT, add_special_tokens=False).ids == plain
        assert tokenizer.encode_batch([TEXT, "a"], add_special_tokens=False)[0].ids == plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(pre_tokenizer={"type": "OfANewerVersion"}), "cannot read it"),
        (lambda data: data.update(model={"type": "Novel", "vocab": {}}), "cannot read it"),
        (lambda data: data.pop("model"), "cannot read it"),
    ],
)
def test_a_tokenizer_that_the_library_cannot_read_is_one_line(
    folder: Path, change: Callable[[dict], object], reason: str
) -> None:
    edit(folder / "tokenizer.json", change)
    with pytest.raises(InputError, match=reason) as caught:
        load_tokenizer(open_native(folder))
    assert f"{folder}: tokenizer.json: tokenizers " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CARRIED_FILES)
@pytest.mark.parametrize("write", ["convert", "copy"])
def test_a_pointer_is_never_carried(folder: Path, tmp_path: Path, name: str, write: str) -> None:
    (folder / name).write_bytes(POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 123545\n")
    source, out = open_native(folder), tmp_path / "out"
    with pytest.raises(InputError, match=f"{name}: a git-lfs pointer"):
        write_folder(source, Fp8Variant("channel"), out) if write == "convert" else write_native(source, out)
    assert not out.exists()


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\xfe{\0}\0", b"[" * 100_000, b'"\xff"', b"", b"{} {}"])
@pytest.mark.parametrize("name", [name for name in CARRIED_FILES if name.endswith(".json")])
def test_json_is_parsed_before_it_is_carried(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=name) as caught:
        carried_files(open_native(folder))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_damage() -> None:
    assert parse_object("x", b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


def test_further_chat_templates_are_carried_in_their_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    for name, write in {
        "copy": lambda source, out: write_native(source, out),
        "convert": lambda source, out: write_folder(source, Fp8Variant("channel"), out),
    }.items():
        out = write(open_native(folder), tmp_path / name)
        assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
        listed = json.loads((out / "mmquant.fit.json").read_text())["artifacts"][0]["files"]
        assert "additional_chat_templates/tool_use.jinja" in [file["path"] for file in listed]
