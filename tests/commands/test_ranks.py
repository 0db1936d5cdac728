"""Commands under torchrun: a rank that dies, stops or has no memory ends all, and the run goes on with other ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.run_cases import CALIBRATION, digests, model
from mmquant.runs.int4 import quantize_int4
from mmquant.runs.options import Int4Options

TIMEOUT = 6  # seconds of the watchdog
OPTIONS = Int4Options(
    group_size=32, propagate="quantized", windows=4, context=32, text=(str(CALIBRATION),), text_only=True
)


def words(source: Path, out: Path) -> list[str]:
    """The same as OPTIONS, typed."""
    found = ["int4", "--model", str(source), "--out", str(out), "--group-size", "32", "--propagate", "quantized"]
    return [*found, "--windows", "4", "--context", "32", "--text", str(CALIBRATION), "--text-only", "--device", "cpu"]


def environment(**more: str) -> dict[str, str]:
    found = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}", "MMQUANT_RANK_TIMEOUT": str(TIMEOUT)}
    return {**found, "OMP_NUM_THREADS": "1", **more}


def free_port(host: str = "127.0.0.1") -> str:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return str(probe.getsockname()[1])


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module under torchrun itself."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [*start, "--master-port", free_port(), "-m", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def started(size: int, arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
    """Ranks that no agent watches over, as when each lies on a host of its own."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", *arguments]
    return [opened(command, environment(RANK=str(rank), **place)) for rank in range(size)]


def opened(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mmquant: ")]


@pytest.mark.parametrize(
    ("kind", "rank", "code", "expected"),
    [
        ("memory", 1, 5, "out of memory"),
        pytest.param("memory", 0, 5, "out of memory", marks=pytest.mark.slow),
        pytest.param("kill", 1, 3, "rank 1 of 2 gave no sign of life", marks=pytest.mark.slow),
        pytest.param("stop", 1, 3, "rank 1 of 2 gave no sign of life", marks=pytest.mark.slow),
        pytest.param("stop", 0, 3, "no longer answers", marks=pytest.mark.slow),
        pytest.param("loop", 1, 3, "rank 0 of 2 waited 30 seconds for another one", marks=pytest.mark.slow),
        pytest.param("loop", 0, 3, "rank 1 of 2 waited 30 seconds for another one", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_fails_ends_the_others_with_one_line(
    kind: str, rank: int, code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has the same exit code, one says why, and any number of ranks takes up what was done."""
    source, out = model(tmp_path / "model"), tmp_path / "out"
    if kind == "loop":
        monkeypatch.setenv("MMQUANT_WAIT_TIMEOUT", "30")
    processes = started(2, ["helpers.failing_rank", kind, str(rank), "1", *words(source, out)])
    lost = processes[rank] if kind in ("kill", "stop") else None
    texts = [process.communicate()[1] for process in processes if process is not lost]
    if lost is not None:
        lost.send_signal(signal.SIGKILL)
        lost.communicate()
    assert [process.returncode for process in processes if process is not lost] == [code] * len(texts), texts
    lines = said("\n".join(texts))
    assert len(lines) == 1, texts
    assert expected in lines[0]
    assert "Traceback" not in "".join(texts)
    quantize_int4(source, out, OPTIONS, device="cpu")  # one process goes on
    assert (out / "mmquant.fit.json").is_file()
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_torchrun_s_own_watch_gives_one_line_too(tmp_path: Path) -> None:
    """torchrun sees the process that died, and ends the other; three ranks finish what two began, as two would."""
    source, out = model(tmp_path / "model"), tmp_path / "out"
    for kind in ("memory", "kill"):
        done = torchrun(2, "helpers.failing_rank", kind, "1", "2", *words(source, out))
        assert done.returncode != 0
        lines = said(done.stderr)
        assert len(lines) == 1, done.stderr
        assert ("out of memory" if kind == "memory" else "run the same command again") in lines[0]
    done = torchrun(3, "mmquant", *words(source, out))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    whole = torchrun(2, "mmquant", *words(source, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    found = [digests(folder) for folder in (out, tmp_path / "whole")]
    assert found[0].keys() == found[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_two_hosts_make_what_one_makes(shared: bool, tmp_path: Path) -> None:
    """Two torchrun groups that know each other by address alone; each with a disk of its own, or with one for both."""
    alone, port = tmp_path / "alone", free_port("127.0.0.1")
    source = model(tmp_path / "first" / "model")
    hosts = []
    for node, name in enumerate(("first", "second")):
        place = source if shared or node == 0 else model(tmp_path / name / "model")
        out = tmp_path / "out" if shared else tmp_path / name / "out"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
        command += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
        command += ["--local-addr", f"127.0.0.{node + 1}", "-m", "mmquant", *words(place, out)]
        hosts.append(opened(command, environment()))
    texts = [host.communicate() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], texts
    assert [len(text.splitlines()) for text, _ in texts] == [1, 0]
    done = torchrun(2, "mmquant", *words(source, alone))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "out" if shared else tmp_path / "first" / "out"
    weights = {name: digest for name, digest in digests(alone).items() if name.endswith(".safetensors")}
    assert weights
    assert weights.items() <= digests(made).items()
    if not shared:
        left = [p for p in (tmp_path / "second" / "out").rglob("*") if p.is_file()]
        assert not left, "the second host keeps nothing"
