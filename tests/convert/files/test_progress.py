"""Damaged progress gives a line that names the file and what starts over; finished work stays."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmquant.convert.files.atomic import temporary_of
from mmquant.convert.files.progress import PROGRESS, Progress
from mmquant.convert.folder.writer import FolderWriter
from mmquant.convert.formats.spec import TensorSpec
from mmquant.convert.gguf.metadata import Value
from mmquant.convert.gguf.writer import GgufWriter, TensorInfo, plan_parts
from mmquant.errors import InputError

STEPS = [[TensorSpec(f"t{i}", "F32", (8,))] for i in range(4)]
TENSORS = tuple(TensorInfo(f"t{i}", (64,), "F32") for i in range(4))
PARTS = plan_parts("m", {"general.architecture": Value("str", "x")}, TENSORS, 1800)


def folder_writer(folder: Path) -> FolderWriter:
    return FolderWriter(folder, STEPS, {"command": "x"}, 70)


def gguf_writer(folder: Path) -> GgufWriter:
    return GgufWriter(folder, PARTS, {"command": "x"})


def start_folder(folder: Path) -> None:
    writer = folder_writer(folder)
    for step in range(3):
        writer.write(step, {f"t{step}": torch.full((8,), float(step))})
    writer.settle()
    writer.close()


def start_gguf(folder: Path) -> None:
    writer = gguf_writer(folder)
    for index in range(3):
        writer.write(f"t{index}", np.full(64, index, np.float32))
        writer.checkpoint()
    writer.close()


def go_on_folder(folder: Path) -> None:
    writer = folder_writer(folder)
    writer.write(3, {"t3": torch.full((8,), 3.0)})
    writer.finish({})


def go_on_gguf(folder: Path) -> None:
    writer = gguf_writer(folder)
    writer.write("t3", np.full(64, 3, np.float32))
    writer.finish()


WRITERS = [
    pytest.param(start_folder, folder_writer, go_on_folder, id="folder"),
    pytest.param(start_gguf, gguf_writer, go_on_gguf, id="gguf"),
]
Start = Callable[[Path], None]
Open = Callable[[Path], Any]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(key: str, value: object) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), key: value}).encode()


def without(key: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != key}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-7],
        lambda data: b"[" * 100_000,
        lambda data: b"[]",
        lambda data: b"\xff\xfe",
        without("done"),
        without("run"),
        without("sha256"),
        changed("done", "3"),
        changed("done", True),
        changed("done", -1),
        changed("done", 5),
        changed("plan", "0" * 64),
        changed("sha256", {"a": 1}),
        changed("sha256", []),
    ],
)
@pytest.mark.parametrize("start, opened, go_on", WRITERS)
def test_damaged_progress_is_one_line_and_loses_nothing(
    tmp_path: Path, start: Start, opened: Open, go_on: Start, damage: Callable[[bytes], bytes]
) -> None:
    start(tmp_path)
    path = tmp_path / PROGRESS
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"{PROGRESS}: .*--fresh starts over") as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("start, opened, go_on", WRITERS)
def test_a_finished_file_that_changed_is_named(tmp_path: Path, start: Start, opened: Open, go_on: Start) -> None:
    """Its size at once, its bytes before the run ends: the digest that was recorded would go into the manifest."""
    start(tmp_path)
    whole = sorted(p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".gguf"))[0]
    data = whole.read_bytes()
    whole.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{whole.name}: SHA-256 .*--fresh starts over"):
        go_on(tmp_path)
    for text, words in ((data[:-1], "bytes, expected the"), (None, "no file, expected the")):
        whole.write_bytes(text) if text is not None else whole.unlink()
        before = contents(tmp_path)
        with pytest.raises(InputError, match=rf"{whole.name}: .*{words}"):
            opened(tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("start, opened, go_on", WRITERS)
def test_a_half_written_file_that_is_short_is_named(tmp_path: Path, start: Start, opened: Open, go_on: Start) -> None:
    start(tmp_path)
    half = [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    for path in half:
        path.write_bytes(path.read_bytes()[:-1])
        before = contents(tmp_path)
        with pytest.raises(InputError, match=rf"{path.name}: \d+ bytes, expected the \d+ bytes that were written"):
            opened(tmp_path)
        assert contents(tmp_path) == before
        path.unlink()
        with pytest.raises(InputError, match=rf"{path.name}: no file"):
            opened(tmp_path)
    assert half


def test_a_digest_that_was_not_recorded_in_time_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    progress = Progress(tmp_path, {}, "plan", 1)
    progress.done = 1
    progress.save()
    again = Progress(tmp_path, {}, "plan", 1)
    again.check({"a": 3})
    again.checked()
    assert again.sha256 == {"a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("make", [folder_writer, gguf_writer])
def test_a_full_disk_is_named_where_closing_finds_it(
    make: Callable[[Path], FolderWriter | GgufWriter], tmp_path: Path
) -> None:
    """What is short stays in the buffer: closing the file writes it, and fails in place of what failed before."""
    writer = make(tmp_path)
    name = writer.parts[0].name if isinstance(writer, GgufWriter) else writer.shards[0].name
    temporary_of(tmp_path / name).symlink_to("/dev/full")
    writer._begin(name, b"x")
    with pytest.raises(OSError) as found:
        writer.close()
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path / name))
    writer.close()
