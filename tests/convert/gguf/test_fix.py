"""`doctor --fix` over several parts is all or nothing: a real process is killed at every change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers.killed import killed_at
from mmquant.commands.gguf import command as gguf_command
from mmquant.convert import manifest
from mmquant.convert.files.atomic import sha256_file
from mmquant.convert.files.together import JOURNAL
from mmquant.convert.gguf.doctor import plan_fix
from mmquant.convert.gguf.fix import apply_fix, finish_interrupted
from mmquant.convert.gguf.reader import GgufSource
from mmquant.errors import InputError

POWERS = {(3, 11): 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as Q8_0 in several parts: up and down projections of an expert lie in different ones."""
    folder = tmp_path_factory.mktemp("model") / "m"
    options = ["--model", "demo", "--out", str(folder), "--type", "Q8_0", "--name", "m", "--max-part-size", "3MB"]
    assert CliRunner().invoke(gguf_command, options, catch_exceptions=False).exit_code == 0
    return folder


def files(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.iterdir() if not p.name.startswith(".mmquant")}


def fix(folder: Path, out: Path | None = None) -> None:
    """What `doctor --fix` does with an unharmed model, and with one that an interrupted fix left."""
    if out is None and finish_interrupted(folder):
        return
    source = GgufSource(folder)
    patches, done, _ = plan_fix(source, POWERS)
    apply_fix(source, patches, out, {"model": source.fingerprint, "powers": sorted([*k, v] for k, v in done.items())})


def copied(model: Path, tmp_path: Path, in_place: bool) -> tuple[Path, Path]:
    """A copy of the model, and where its fix goes."""
    shutil.copytree(model, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" if in_place else tmp_path / "out"


def changes(model: Path, tmp_path: Path, in_place: bool) -> Iterator[int]:
    """Kill at the first change of the folder, the second, and so on, until a run lives to its end."""
    for number in range(1, 100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        source, target = copied(model, tmp_path, in_place)
        pattern = "" if in_place else "rename|remove"
        if not killed_at(tmp_path, number, lambda: fix(source, None if in_place else target), pattern):  # noqa: B023
            return
        yield number
    raise AssertionError("it never ends")


@pytest.mark.parametrize("in_place", [True, False])
def test_killed_at_any_change_it_is_all_or_nothing_and_goes_on(model: Path, tmp_path: Path, in_place: bool) -> None:
    where = tmp_path / "tries"
    where.mkdir()
    source, target = copied(model, tmp_path, in_place)
    fix(source, None if in_place else target)
    whole, before = files(target), files(model)
    assert sum(whole[name] != digest for name, digest in before.items() if name.endswith(".gguf")) >= 2
    mixed = 0
    for _ in changes(model, where, in_place):
        source, target = where / "copy", where / "copy" if in_place else where / "out"
        names = [p for p in target.glob("*.gguf")] if target.is_dir() else []
        now = {p.name: sha256_file(p) for p in names}
        if in_place and now not in ({n: d for n, d in side.items() if n in now} for side in (before, whole)):
            mixed += 1
            assert (target / JOURNAL).is_file()
        if (target / JOURNAL).is_file():
            with pytest.raises(InputError, match="a fix of these files was interrupted"):
                GgufSource(target)
        if not target.is_dir() or files(target) != whole or (target / JOURNAL).exists():
            fix(source, None if in_place else target)  # whoever measures finds nothing to rescale once it is whole
        assert files(target) == whole
        assert not (target / JOURNAL).exists()
    assert mixed >= 1 or not in_place


def test_the_manifest_names_the_new_bytes(model: Path, tmp_path: Path) -> None:
    source, _ = copied(model, tmp_path, in_place=True)
    fix(source)
    found = manifest.read(source)
    assert found is not None
    listed = {f["path"]: f["sha256"] for f in found["artifacts"][0]["files"]}
    assert listed == {name: sha256_file(source / name) for name in listed}


def test_a_journal_that_does_not_fit_its_files_changes_nothing(model: Path, tmp_path: Path) -> None:
    source, _ = copied(model, tmp_path, in_place=True)
    before = files(source)
    for text, words in (
        ("{", "not readable"),
        ('{"what": {}, "files": {"../x": "0"}}', "not readable"),
        ('{"what": {}, "files": {"m-00001-of-00009.gguf": "0"}}', "says 0"),
    ):
        (source / JOURNAL).write_text(text)
        with pytest.raises(InputError, match=words):
            finish_interrupted(source)
    assert files(source) == before


def test_an_occupied_place_is_refused(model: Path, tmp_path: Path) -> None:
    source, target = copied(model, tmp_path, in_place=False)
    fix(source, target)
    with pytest.raises(InputError, match="exists, expected a new place"):
        fix(source, target)
