"""Weight files that leave while later layers are made: the disk never holds an artifact, and the hub gets its bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.calibration_cases import ranks
from helpers.hub_server import HubServer
from helpers.killed import killed_at
from helpers.run_cases import EVALUATION, Notes, model, recipe, serve
from mmquant.convert.hub.http import Retry
from mmquant.errors import InputError, PartialError
from mmquant.runs.recipe.read import Recipe
from mmquant.runs.run import run

VARIANTS = """
  fp8: {command: fp8, max_shard_size: 300KB}
  rtn: {command: int4, method: rtn, group_size: 32, max_shard_size: 300KB}
  Q8_0: {command: gguf, type: Q8_0, max_part_size: 900KB}
"""
NAMES = ("fp8", "rtn", "Q8_0")
CHECK = f"check: {{text: {EVALUATION}, windows: 2, context: 32}}\n"
EARLY = "as_completed: true, private: true, delete_after_upload: true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=4)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, tmp_path)
        serve(server, folder)
        yield server


def wanted(how: str, check: str = CHECK) -> Recipe:
    orders = "".join(f"  - {{repo: me/{name}, variants: [{name}], {how}}}\n" for name in NAMES)
    return recipe("hf:org/m", VARIANTS, f"{check}push:\n{orders}")


def published(hub: HubServer) -> dict[str, str]:
    """Digests of all weights, configs and indexes in the repositories."""
    trees = {name: hub.tree(f"me/{name}") for name in NAMES}
    apart = ("README.md", "FIT.md", "mmquant.report.html", "SHA256SUMS", "mmquant.fit.json", ".gitattributes")
    return {f"{n}/{p}": entry.sha256 for n, tree in trees.items() for p, entry in tree.items() if p not in apart}


def weights(out: Path) -> list[Path]:
    return [path for name in NAMES for kind in ("safetensors", "gguf") for path in (out / name).rglob(f"*.{kind}")]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Any]]:
    """What an ordinary push leaves on a hub, and the scores."""
    place = tmp_path_factory.mktemp("whole")
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        server.use(patch, place)
        serve(server, folder)
        made = run(wanted("private: true"), place / "run", device="cpu")
        return published(server), {row["name"]: row["scores"] for row in made.rows()}


def test_files_leave_before_the_last_layer(hub: HubServer, whole: Any, tmp_path: Path) -> None:
    """At every commit but the last ones the head is not written, and few files are here."""
    out, here, titles = tmp_path / "run", list[int](), list[bool]()

    def watch(line: str) -> None:
        if line.startswith("POST /api/models/me/") and "/commit/" in line:
            here.append(sum(path.stat().st_size for path in weights(out)))
            titles.append((out / "fp8" / "mmquant.fit.json").exists())

    hub.watch = watch
    made = run(wanted(EARLY), out, device="cpu")
    assert published(hub) == whole[0]
    assert {row["name"]: row["scores"] for row in made.rows()} == whole[1]
    assert {row["state"] for row in made.rows()} == {"pushed"}
    assert not weights(out)
    early = titles.index(True)
    assert early > 6
    assert max(here) < sum(row["bytes"] for row in made.rows()) / 2
    for name in NAMES:
        history = hub.repos[f"me/{name}"].history()
        assert history[0].title == "Add card, manifest and sums"
        assert all("mmquant.fit.json" not in commit.tree for commit in history[1:])
        assert hub.repos[f"me/{name}"].private


@pytest.mark.parametrize(
    "pattern",
    [
        r"rename fp8/\.mmquant-push\.",
        pytest.param(r"remove rtn/model", marks=pytest.mark.slow),
        pytest.param(r"rename Q8_0/.*\.gguf", marks=pytest.mark.slow),
    ],
)
def test_a_killed_uploader(hub: HubServer, whole: Any, tmp_path: Path, pattern: str) -> None:
    out = tmp_path / "run"
    work = partial(run, wanted(EARLY), out, device="cpu")
    assert killed_at(out, 4, work, pattern)
    assert killed_at(out, 3, work, pattern)
    made = work()
    assert published(hub) == whole[0]
    assert {row["name"]: row["scores"] for row in made.rows()} == whole[1]
    assert not weights(out)
    commits = [len(hub.repos[f"me/{name}"].commits) for name in NAMES]
    work()
    assert [len(hub.repos[f"me/{name}"].commits) for name in NAMES] == commits


def test_the_network_goes_while_files_leave(
    hub: HubServer, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("mmquant.convert.hub.http.Retry", lambda: Retry(0, 0.01, 0.02, 20.0))
    hub.fault("GET /api/models/me/[^?]*/tree/", status=503, times=1 << 30)
    with pytest.raises(PartialError, match="run again to continue"):
        run(wanted(EARLY), out, device="cpu")
    hub.faults.clear()
    run(wanted(EARLY), out, device="cpu")
    assert published(hub) == whole[0]


def test_other_ranks_wait_for_a_slow_upload(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No commit is answered for longer than the watchdog's time; its threads live, and the run ends well."""
    monkeypatch.setenv("MMQUANT_RANK_TIMEOUT", "4")
    hub.hold(r"POST /api/models/me/.*/commit/")
    late = threading.Timer(10.0, hub.let_go)
    late.start()
    ranks(2, lambda: run(wanted(EARLY, ""), tmp_path / "run", device="cpu"))
    late.join()
    assert not weights(tmp_path / "run")
    assert all(any(path.endswith((".safetensors", ".gguf")) for path in hub.tree(f"me/{name}")) for name in NAMES)


def test_a_check_that_begins_anew_makes_again_what_is_gone(hub: HubServer, whole: Any, tmp_path: Path) -> None:
    out, notes = tmp_path / "run", Notes()
    assert killed_at(out, 5, lambda: run(wanted(EARLY), out, device="cpu"), r"remove fp8/model")
    other = CHECK.replace("windows: 2", "windows: 1")
    made = run(wanted(EARLY, other), out, device="cpu", monitor=notes)
    assert "fp8: the check begins anew and reads files that were deleted: made again" in notes.lines
    assert published(hub) == whole[0]
    assert all(row["scores"]["tokens"] < whole[1]["fp8"]["tokens"] for row in made.rows())
    run(wanted(EARLY), out, device="cpu", monitor=notes)
    assert notes.lines[-1] == "Q8_0: is on its hub and no longer here: its scores stay those of the last check"


def test_what_the_check_refuses_keeps_its_card(hub: HubServer, tmp_path: Path) -> None:
    gate = CHECK.replace("context: 32", "context: 32, gates: {max_kld: 0.000001}")
    made = run(wanted(EARLY, gate), tmp_path / "run", device="cpu")
    assert made.failure is not None
    assert "config.json" not in hub.tree("me/rtn")
    assert any(line.startswith("rtn: weights are in hf:me/rtn without card and manifest") for line in made.lines())


def test_an_unchecked_file_is_not_public() -> None:
    with pytest.raises(InputError, match=r"recipe.yaml:\d+: push.0.as_completed: what the check refuses would be"):
        wanted("as_completed: true")
    assert wanted("as_completed: true", "").push[0].as_completed
