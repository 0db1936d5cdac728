"""The page of finished artifacts: distances, machines, commands to copy; hostile manifests stay text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmquant
from mmquant.errors import InputError
from mmquant.runs.reports.artifacts import artifacts_page, distance

from .test_reports import HOSTILE, Check

QUALITY = {"kld": {"mean": 0.02, "mean_ci95": [0.018, 0.022]}, "top1": 0.91, "ppl_ratio": 1.01}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artifact, written by the real command."""
    top = tmp_path_factory.mktemp("run")
    mmquant.quantize_fp8("demo", top / "a")
    return top


@pytest.fixture
def manifest(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "a" / "mmquant.fit.json").read_text())
    found["artifacts"][0]["quality"] = {"status": "measured", "metrics": json.loads(json.dumps(QUALITY))}
    return found


def test_the_page_has_distances_machines_and_whole_commands(manifest: dict[str, Any]) -> None:
    text = artifacts_page("run", [manifest])
    check = Check(text)
    (artifact,) = manifest["artifacts"]
    for shown in (artifact["id"], "0.02000", "0.01800 .. 0.02200", "91.00", artifact["files"][0]["sha256"]):
        assert shown in text
    fitting = [t for t in manifest["targets"] if t["fits"] != "no"]
    assert fitting
    assert text.count("vllm serve . --tensor-parallel-size") == sum(t["engine"] == "vllm" for t in fitting)
    assert check.tags.count("button") == check.tags.count("pre") - 1  # all but the provenance
    assert check.tags.count("details") == len({t["id"] for t in manifest["targets"]}) + 1
    assert check.tags.count("svg") == 1


def test_the_only_script_is_the_one_that_the_policy_names(manifest: dict[str, Any]) -> None:
    text = artifacts_page("run", [manifest])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_hostile_names_stay_text(manifest: dict[str, Any]) -> None:
    for target in manifest["targets"]:
        target["artifact"] = HOSTILE
        target["launch"]["argv"] = ["vllm", "serve", HOSTILE]
    manifest["artifacts"][0]["id"] = HOSTILE
    manifest["artifacts"][0]["provenance"] = {HOSTILE: HOSTILE, "command_line": [HOSTILE]}
    check = Check(artifacts_page(HOSTILE, [manifest]))
    assert check.tags.count("script") == 1


@pytest.mark.parametrize("kld", [None, 3, {}, {"mean": None}, {"mean": "x"}, {"mean": float("nan")}])
def test_a_distance_that_is_none_is_shown_as_none(kld: object, manifest: dict[str, Any]) -> None:
    manifest["artifacts"][0]["quality"]["metrics"]["kld"] = kld
    assert distance(manifest["artifacts"][0]) is None
    assert "Not measured: mmquant eval" in artifacts_page("run", [manifest])


def test_an_interval_that_is_none_is_the_mean(manifest: dict[str, Any]) -> None:
    for interval in (None, [], ["x", 1], [float("inf"), 1.0]):
        manifest["artifacts"][0]["quality"]["metrics"]["kld"]["mean_ci95"] = interval
        assert distance(manifest["artifacts"][0]) == (0.02, 0.02, 0.02)


def test_the_command_reports_an_artifact_and_a_folder_of_them(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "run" / "a"):
        made = mmquant.report(folder)
        assert made.path == folder / "mmquant.report.html"
        assert made.artifacts == ("FP8-block",)
        assert "FP8-block" in made.path.read_text()
    assert mmquant.report(tmp_path / "run", tmp_path / "r.html").path == tmp_path / "r.html"


def test_artifacts_of_one_name_are_told_apart(finished: Path, tmp_path: Path) -> None:
    """Two folders of one variant: each has its own row, column and commands."""
    for name in ("plain", "calibrated"):
        shutil.copytree(finished / "a", tmp_path / "o" / name)
    path = tmp_path / "o" / "calibrated" / "mmquant.fit.json"
    changed = json.loads(path.read_text())
    for target in changed["targets"]:
        target["fits"], target["missing"] = "no", 3 << 29
    path.write_text(json.dumps(changed))
    made = mmquant.report(tmp_path / "o", tmp_path / "page.html")
    assert made.artifacts == ("FP8-block (calibrated)", "FP8-block (plain)")
    text = (tmp_path / "page.html").read_text()
    assert text.count("no, 1.50 GiB missing") == 2 * len(changed["targets"])  # in the table and before the commands
    assert "vllm serve" in text


def test_without_matplotlib_the_numbers_are_there(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = artifacts_page("run", [manifest])
    assert "Plots are missing" in text
    assert "0.02000" in text


def a_file(path: Path) -> None:
    path.write_text("{}")


def nothing_finished(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such folder"),
        (a_file, "no such folder"),
        (nothing_finished, "no mmquant.fit.json in it or one level below"),
    ],
)
def test_what_is_no_folder_of_artifacts_is_refused(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=said):
        mmquant.report(tmp_path / "x")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "an object"), ('{"schema": 3}', "expected")])
def test_an_evaluation_that_is_none_is_refused(text: str, said: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(InputError, match=said):
        mmquant.report(finished, tmp_path / "r.html", [tmp_path / "e.json"])
    assert not (tmp_path / "r.html").exists()
