"""After the prefetcher's pool shuts down, nothing waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from mmquant.convert.hub.prefetch import DaemonPool, Prefetcher


def test_a_pool_that_was_shut_down_takes_no_more_work() -> None:
    pool = DaemonPool(2)
    assert pool.submit(lambda: 7).result(60) == 7
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(lambda: 8)
    pool.shutdown()  # once more does no harm


def test_waiting_work_is_cancelled_and_running_work_finishes() -> None:
    pool, go, begun = DaemonPool(1), threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        go.wait()
        return 1

    running = pool.submit(work)
    waiting = pool.submit(lambda: 2)
    begun.wait()
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(60)
    go.set()
    assert running.result(60) == 1
    pool.shutdown()


def test_work_that_was_taken_is_done_before_shutdown_returns() -> None:
    pool, done = DaemonPool(1), []
    for number in range(5):
        pool.submit(done.append, number)
    pool.shutdown()
    assert done == list(range(5))


def test_a_prefetcher_whose_pool_is_gone_says_so(tmp_path: Path) -> None:
    pool = DaemonPool(1)
    pool.shutdown()

    def fetch(name: str) -> tuple[Path, bool]:
        return pool.submit(lambda: tmp_path / name).result(), True

    prefetcher = Prefetcher(fetch, {"a": 1}, None, 4, keep=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        prefetcher.path("a")
