"""Files appear whole, by one helper everywhere; a lock names its owner and admits nobody else."""

from __future__ import annotations

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.killed import killed_at
from helpers.paths import SOURCE
from mmquant.convert.files.atomic import copy_whole, replace_folder, said_of, sha256_file, whole_file, write_whole
from mmquant.convert.files.lock import HOLDER, LOCK, hold
from mmquant.errors import InputError

PACKAGES = ("commands", "runs", "calibration", "convert", "quantize")
CALLS = {
    "write_bytes",
    "write_text",
    "tofile",
    "rename",
    "renames",
    "copyfile",
    "copy2",
    "copytree",
    "save_file",
}
PAIRS = {("os", "replace"), ("torch", "save"), ("torch", "load"), ("np", "save"), ("np", "savez"), ("json", "dump")}
PAIRS |= {
    ("pickle", "dump"),
    ("pickle", "load"),
    ("shutil", "copy"),
    ("shutil", "move"),
    ("os", "open"),
    ("os", "fsync"),
}
# Whose files are not left behind, or grow under a temporary name of convert/files until it renames them.
ALLOWED = {
    ("calibration/evaluate/reference_store.py", "open wb"),  # a rank's part, joined and removed
    ("calibration/plan/knapsack.py", "open"),  # the null device
    ("convert/gguf/fix.py", "copyfile"),  # into temporary files that `replace_together` renames
    ("convert/gguf/fix.py", "open rb+"),
    ("convert/hub/fetch.py", "open wb"),  # NAME.part: blocks in any order, with a record
    ("convert/hub/fetch.py", "open rb+"),
    ("convert/hub/gguf_flow.py", "open wb"),  # a step's bytes, removed behind it
    ("convert/hub/xet.py", "open wb"),  # a child's log
}


def writes(tree: ast.Module) -> Iterator[str]:
    """Calls that make, rename or copy files without the helpers."""
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        mode = node.args[1] if owner == "" and len(node.args) > 1 else node.args[0] if owner and node.args else None
        written = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) & set("wax+")
        if name == "open" and isinstance(mode, ast.Constant) and written:
            yield f"open {mode.value}"
        elif name in CALLS or (owner, name) in PAIRS:
            yield name
        elif (
            name == "replace" and len(node.args) == 1 and owner and not node.keywords
        ):  # Path.replace; str.replace has two
            yield "Path.replace"
    for text in (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)):
        if text.endswith(".tmp") and len(text) < 20:
            yield text


def test_product_code_writes_files_by_the_helpers_alone() -> None:
    found = set()
    for path in (p for package in PACKAGES for p in sorted((SOURCE / package).rglob("*.py"))):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith("convert/files/"):
            found |= {(name, call) for call in writes(ast.parse(path.read_text("utf-8")))}
    assert found == ALLOWED


@pytest.mark.parametrize("code", ["os.replace(a, b)", "a.rename(b)", "a.replace(b)", "open(a, 'wb')", "a.open('w')"])
def test_the_test_sees_other_ways(code: str) -> None:
    assert list(writes(ast.parse(code)))


def test_a_file_is_whole_or_as_before_whenever_the_process_dies(tmp_path: Path) -> None:
    path, number = tmp_path / "x", 0
    for number in range(1, 20):
        path.write_bytes(b"old")
        if not killed_at(tmp_path, number, lambda: write_whole(path, b"new")):
            break
        assert path.read_bytes() in (b"old", b"new")
    assert path.read_bytes() == b"new"
    assert number > 2


def test_copies_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    assert copy_whole(tmp_path / "a", tmp_path / "b") == sha256_file(tmp_path / "a")
    monkeypatch.setattr("mmquant.convert.files.atomic.sha256_file", lambda path: "0")
    with pytest.raises(OSError, match="reads back differently"):
        copy_whole(tmp_path / "a", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path: Path) -> None:
    for name in ("made", "out", "full"):
        (tmp_path / name).mkdir()
    for name in ("made", "full"):
        (tmp_path / name / "x").write_bytes(b"1")
    with pytest.raises(OSError):
        replace_folder(tmp_path / "made", tmp_path / "full")
    replace_folder(tmp_path / "made", tmp_path / "out")
    assert (tmp_path / "out" / "x").read_bytes() == b"1"


def test_a_lock_goes_with_its_process_and_leaves_nothing(tmp_path: Path) -> None:
    def dies() -> None:
        with hold(tmp_path):
            write_whole(tmp_path / "file", b"")

    assert killed_at(tmp_path, 1, dies, "rename file")
    with hold(tmp_path), pytest.raises(InputError, match=rf"in use by process {os.getpid()} on "), hold(tmp_path):
        pass
    assert not [p for p in tmp_path.iterdir() if p.name in (LOCK, HOLDER)]


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "x") as file:
        file.write(b"half" * (1 // 0))
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """Not the temporary one, which nobody typed; what the error itself names stays."""
    for write in (lambda path: write_whole(path, b"x"), lambda path: whole_file(path).__enter__()):
        with pytest.raises(FileNotFoundError) as missing:
            write(tmp_path / "none" / "a.yaml")
        assert missing.value.filename == str(tmp_path / "none" / "a.yaml")
    full, other, named = OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "x"), OSError(errno.ENOENT, "x", "b")
    for given, expected in ((full, "a"), (other, None), (named, "b")):
        with pytest.raises(OSError) as found, said_of(Path("a")):
            raise given
        assert found.value.filename == expected
