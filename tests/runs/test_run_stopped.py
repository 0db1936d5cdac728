"""A run that is stopped in any way ends with the bytes of an uninterrupted one, and says where it goes on."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hub_server import HubServer
from helpers.killed import change_of, forked, killed_at, until
from helpers.run_cases import EVALUATION, TEXT, Notes, artifacts, model, recipe, serve
from mmquant.convert.files.lock import hold
from mmquant.convert.hub.http import Retry
from mmquant.convert.hub.store import FetchOptions
from mmquant.errors import InputError, PartialError
from mmquant.runs.recipe.read import Recipe
from mmquant.runs.run import run
from mmquant.runs.status import status

VARIANTS = """
  fp8: {command: fp8, max_shard_size: 600KB}
  int4: {command: int4, group_size: 32}
  Q4_0: {command: gguf, type: Q4_0, max_part_size: 500KB}
  Q5_0: {command: gguf, type: Q5_0}
  fast: {command: gguf, type: Q4_0, effort: fast}
"""
CHECK = f"check: {{text: {EVALUATION}, windows: 2, context: 32}}\n"
QUICK = FetchOptions(retry=Retry(1, 0.01, 0.02, 20.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=2)


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path_factory.mktemp("caches"))
        serve(server, folder)
        yield server


def wanted(variants: str = VARIANTS) -> Recipe:
    return recipe("hf:org/m", variants, CHECK if variants is VARIANTS else "")


@pytest.fixture(scope="module")
def whole(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Digests of an uninterrupted run's artifacts, and the changes that it made of its folder."""
    out, count = tmp_path_factory.mktemp("whole") / "run", 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        found = change_of(event, arguments)
        count += found is not None and os.path.abspath(found[1]).startswith(f"{out}{os.sep}")

    sys.addaudithook(watch)
    run(wanted(), out, device="cpu")
    return artifacts(out), count


def kills(out: Path, counts: list[int], expected: dict[str, str]) -> None:
    """Kill a run again and again at its so many-th change, then let it end."""
    notes = Notes()
    for count in counts:
        if killed_at(out, count, lambda: run(wanted(), out, device="cpu")):
            assert status(out).state == "killed"
    last = status(out)
    run(wanted(), out, device="cpu", monitor=notes)
    assert artifacts(out) == expected
    if 1 < last.step < last.steps and last.state == "killed":  # the first may have been on its way to the disk
        assert [line for line in notes.lines if "continues " in line]
    assert status(out).state == "finished"
    assert not list(out.rglob(".hidden-*"))
    assert not (out / ".mmquant.source").exists()


def test_eight_kills_cost_a_step_each(whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    expected, changes = whole
    kills(tmp_path / "run", [changes // 8 + 5 * number for number in range(8)], expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_fifty_random_kills(whole: tuple[dict[str, str], int], tmp_path: Path, seed: int) -> None:
    expected, changes = whole
    chosen = random.Random(seed)
    kills(tmp_path / "run", [chosen.randrange(1, changes // 3) for _ in range(5)], expected)


def test_power_loss_takes_what_was_not_synced(whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """Files lose what was written behind their last fsync, and are gone where there was none."""
    expected, changes = whole
    out, record = tmp_path / "run", tmp_path / "synced"

    def child() -> None:
        with open(record, "ab", buffering=0) as file:
            original = os.fsync

            def fsync(handle: int) -> None:
                found = os.fstat(handle)
                original(handle)
                file.write(f"{found.st_ino} {found.st_size}\n".encode())

            os.fsync = fsync
            run(wanted(), out, device="cpu")

    durable: set[Path] = set()
    for count in (changes // 4, changes // 3):
        record.write_bytes(b"")
        assert killed_at(out, count, child)
        synced = {int(inode): int(size) for inode, size in map(str.split, record.read_text().splitlines())}
        before = {path: path.stat() for path in out.rglob("*") if path.is_file()}
        for path, found in before.items():
            if found.st_ino in synced:
                os.truncate(path, min(found.st_size, synced[found.st_ino]))
            elif path not in durable:
                path.unlink()
        durable = {path for path in out.rglob("*") if path.is_file()}
    run(wanted(), out, device="cpu")
    assert artifacts(out) == expected


def test_the_network_goes(hub: HubServer, whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    hub.fault("GET /cdn/", times=2)
    hub.fault("GET /cdn/", times=1 << 30, cut=1000)
    with pytest.raises(PartialError, match="run again to continue"):
        run(wanted(), out, device="cpu", fetch=QUICK)
    assert status(out).state == "stopped"
    hub.faults.clear()
    run(wanted(), out, device="cpu", fetch=QUICK)
    assert artifacts(out) == whole[0]


@pytest.mark.slow
def test_a_full_disk(whole: tuple[dict[str, str], int], tmp_path: Path) -> None:
    """Files cannot grow past half of the largest one: one line, nothing lost."""
    out = tmp_path / "run"

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as found:
            run(wanted(), out, device="cpu")
        assert found.value.errno == errno.EFBIG

    process = forked(child)
    process.join()
    assert process.exitcode == 0
    assert status(out).state == "stopped"
    run(wanted(), out, device="cpu")
    assert artifacts(out) == whole[0]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals(
    hub: HubServer, whole: tuple[dict[str, str], int], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(f"model: hf:org/m\n{TEXT}\nvariants:{VARIANTS}{CHECK}")
    hub.hold("GET /cdn/", after=7)  # five headers first
    command = [sys.executable, "-m", "mmquant", "run", str(file), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until(process, lambda: hub.held > 0)
    process.send_signal(number)
    _, said = process.communicate()
    hub.let_go()
    assert process.returncode == code
    assert said.splitlines()[-1] == "mmquant: interrupted; run the same command again to continue"
    run(wanted(), out, device="cpu")
    assert artifacts(out) == whole[0]


FEW = """
  fp8: {command: fp8}
  rtn: {command: int4, method: rtn, group_size: 32}
"""


def test_two_runs_in_one_folder(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run"), pytest.raises(InputError, match="in use by process"):
        run(wanted(FEW), tmp_path / "run", device="cpu")


def test_a_changed_recipe_makes_again_what_changed(hub: HubServer, tmp_path: Path) -> None:
    out, notes = tmp_path / "run", Notes()
    run(wanted(FEW), out, device="cpu")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    changed = wanted(
        FEW.replace("group_size: 32", "group_size: 64").replace("fp8:", "old:") + "  new: {command: gguf, type: Q8_0}\n"
    )
    with pytest.raises(InputError, match="rtn: finished with --group-size 32, now 64; give it another name, or --repl"):
        run(changed, out, device="cpu")
    run(changed, out, device="cpu", replace=True, monitor=notes)
    assert "rtn: --group-size 32, now 64: made again" in notes.lines
    assert f"fp8: no longer in the recipe; {out / 'fp8'} stays as it is" in notes.lines
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if "fp8" in path.parts)
    alone = tmp_path / "alone"
    run(changed, alone, device="cpu")
    assert artifacts(out) == {**artifacts(alone), **{n: d for n, d in artifacts(out).items() if n.startswith("fp8/")}}


def test_a_killed_uploader(hub: HubServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe_ = recipe("hf:org/m", FEW, "push:\n  - {repo: me/fp8, variants: [fp8], delete_after_upload: true}\n")
    work = partial(run, recipe_, out, device="cpu")
    assert killed_at(out, 3, work, r"rename fp8/\.mmquant-push\.")
    made = work()
    assert {row["name"]: row["state"] for row in made.rows()} == {"fp8": "pushed", "rtn": "written"}
    assert "model-00001-of-00001.safetensors" in hub.tree("me/fp8")
    assert not list((out / "fp8").glob("*.safetensors"))
    commits = len(hub.repos["me/fp8"].commits)
    work()
    assert len(hub.repos["me/fp8"].commits) == commits
