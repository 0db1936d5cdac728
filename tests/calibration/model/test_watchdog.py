"""A rank that is stopped or killed ends the others; what was done is continued on another number of ranks."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.distributed import distributed_c10d as c10d

from helpers.calibration_cases import begin, model, ranks, run, tensors
from helpers.killed import forked
from mmquant.calibration.model import distributed
from mmquant.calibration.model.distributed import leave, world
from mmquant.calibration.model.watchdog import EXIT, Watchdog, rank_timeout, wait_timeout
from mmquant.calibration.statistics.store import open_statistics
from mmquant.errors import InputError


@pytest.mark.parametrize("kind", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_rank_ends_the_run_with_one_line(kind: signal.Signals, tmp_path: Path) -> None:
    """Stopped or killed, the others notice though no collective fails; the lowest that lives says it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MMQUANT_RANK_TIMEOUT": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.dup2(os.open(tmp_path / str(rank), os.O_CREAT | os.O_WRONLY), 2)
        world()
        dist.barrier()
        if rank == 2:
            os.kill(os.getpid(), kind)
        signal.pause()  # a collective that waits for the lost rank, of whichever backend

    processes = [forked(child, rank) for rank in range(3)]
    for process in processes[:2]:
        process.join()
    processes[2].kill()
    processes[2].join()
    assert EXIT in [process.exitcode for process in processes[:2]]
    said = "".join((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert "rank 2 of 3 gave no sign of life for 2 seconds; run the same command again" in said
    assert said.count("mmquant: rank 2") == 1


def test_a_rank_leaves_in_order_when_the_store_has_left_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 keeps the store where no agent does, and ends as soon as it is done."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    ends: list[object] = []
    watchdog = Watchdog(1, 2, 600.0, lambda *said: ends.append(said))
    del store
    gc.collect()
    with pytest.raises(RuntimeError):
        watchdog._count(1, 0)  # pyright: ignore[reportPrivateUsage] - the store is gone
    watchdog.leave()
    assert not ends


def test_a_rank_that_ends_in_order_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMQUANT_RANK_TIMEOUT", "0.3")

    def work() -> None:
        rank, _ = world()
        dist.barrier()
        if rank == 0:  # hosts the meeting place
            _, status = os.waitpid(os.spawnvp(os.P_NOWAIT, "sleep", ["sleep", "1"]), 0)
            assert status == 0
        leave()

    ranks(2, work)


@pytest.mark.parametrize("patience", [None, "1"])
def test_a_collective_waits_while_another_rank_is_busy(patience: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the watchdog's time, since its threads live; as long as it is told to, not as a backend does."""
    monkeypatch.setenv("MMQUANT_RANK_TIMEOUT", "2" if patience is None else "60")
    if patience is not None:
        monkeypatch.setenv("MMQUANT_WAIT_TIMEOUT", patience)

    def work() -> None:
        rank, _ = world()
        dist.barrier()
        if rank == 0:
            time.sleep(5)
        if patience is None:
            dist.barrier()
        elif rank == 1:
            with pytest.raises(RuntimeError) as late:
                dist.barrier()
            assert "rank 1 of 2 waited 1 seconds for another one" in str(distributed.waited_long(late.value))
            assert distributed.waited_long(RuntimeError("CUDA error: the launch timed out")) is None
        os._exit(0)  # the group may be broken

    ranks(2, work)


def test_ranks_meet_again_as_late_as_a_collective_waits() -> None:
    """NCCL makes communicators at first use: by default a rank waits half an hour in the store for the others then."""

    def work() -> None:
        world()
        store: Any = c10d._get_default_store()
        assert store.timeout == timedelta(hours=12)
        leave()

    ranks(2, work)


@pytest.mark.parametrize("variable", ["MMQUANT_RANK_TIMEOUT", "MMQUANT_WAIT_TIMEOUT"])
def test_seconds_that_are_none_are_one_line(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = rank_timeout if variable == "MMQUANT_RANK_TIMEOUT" else wait_timeout
    for text in ("soon", "0", "-1", "nan", "inf", "1e300"):
        monkeypatch.setenv(variable, text)
        with pytest.raises(InputError, match=f"^{variable}={text}: expected seconds, above 0"):
            read()
    monkeypatch.setenv(variable, " ")
    assert read() == (45.0 if variable == "MMQUANT_RANK_TIMEOUT" else 43200.0)


def test_a_run_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    source = model(tmp_path)
    alone = run(source, tmp_path / "alone")
    ranks(2, lambda: begin(source, tmp_path / "out"))
    assert open_statistics(tmp_path / "out").layers == 2
    ranks(3, lambda: run(source, tmp_path / "out"))
    stored = open_statistics(tmp_path / "out")
    for layer, value in enumerate(alone):
        found = tensors(stored.layer(layer))
        for name, wanted in tensors(value).items():
            assert torch.allclose(wanted, found[name], rtol=1e-5, atol=1e-5 * max(1.0, float(wanted.abs().max()))), name
