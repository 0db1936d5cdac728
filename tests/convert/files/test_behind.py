"""Work behind a thread: in order, bounded, and ended by its first error."""

from __future__ import annotations

import hashlib
import threading

import pytest

from mmquant import stages
from mmquant.convert.files.behind import Behind
from mmquant.convert.files.digest import SideDigest
from mmquant.stages import Stages, stage, stage_of, timing


def test_work_is_done_in_order_and_waited_for() -> None:
    found: list[int] = []
    behind = Behind()
    for number in range(100):
        behind.put(lambda number=number: found.append(number), 1)
    behind.wait()
    assert found == list(range(100))


def test_no_more_waits_than_the_limit() -> None:
    """Whoever hands in more than fits waits until there is room; one piece always fits."""
    behind, free, handed = Behind(10), threading.Semaphore(0), []

    def hand_in() -> None:
        for size in (50, 4, 6, 1):
            behind.put(free.acquire, size)
            handed.append(size)
        full.set()

    full = threading.Event()
    thread = threading.Thread(target=hand_in)
    thread.start()
    free.release()  # 50 is done: 4 and 6 fit beside each other, 1 does not
    while len(handed) < 3:
        pass
    assert not full.is_set()
    free.release()
    assert full.wait(60)
    free.release(2)
    behind.wait()
    thread.join()
    assert handed == [50, 4, 6, 1]


def test_the_first_error_drops_the_rest_and_names_its_stage() -> None:
    behind, go, found = Behind(), threading.Event(), []

    def fail() -> None:
        go.wait()
        with stage("write"):
            raise OSError(28, "No space left on device")

    behind.put(fail)
    behind.put(lambda: found.append(1))
    go.set()
    for call in (behind.wait, behind.wait, lambda: behind.put(lambda: None)):
        with pytest.raises(OSError, match="No space left") as caught:
            call()
        assert stage_of(caught.value) == "write"
    behind.close()
    assert not found


def test_close_drops_what_waits_and_lets_what_runs_end() -> None:
    behind, running, go, found = Behind(), threading.Event(), threading.Event(), []

    def work() -> None:
        running.set()
        go.wait()
        found.append("ran")

    behind.put(work)
    behind.put(lambda: found.append("dropped"))
    running.wait()
    closing = threading.Thread(target=behind.close)
    closing.start()
    while behind._work:
        pass
    go.set()
    closing.join()
    assert found == ["ran"]


def test_stages_count_themselves_alone_and_apart_from_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(stages.time, "perf_counter", lambda: now)
    found = Stages()
    with stage("nobody hears"):
        later(100)
    with timing(found):
        with stage("outer"):
            later(1)
            with stage("inner"):
                later(2)
                with stage("innermost"):
                    later(4)
            later(8)

        def fail() -> None:
            with stage("outer"):
                later(16)
                raise ValueError("x")

        with pytest.raises(ValueError, match="x"):
            fail()
        behind = Behind()

        def write() -> None:
            with stage("write"):
                later(32)

        behind.put(write)
        behind.wait()
    assert found.take(behind=True) == {"write": 32.0}
    assert {name: seconds for name, seconds in found.take().items() if name != "wait"} == {
        **{"outer": 1.0 + 8 + 16, "inner": 2.0, "innermost": 4.0},
    }
    assert found.take() == {}


def test_the_digest_is_that_of_all_pieces() -> None:
    digest = SideDigest()
    for pieces in ([b"a" * 1000, b"b"], [b""], [bytes(range(256))] * 300):
        digest.begin()
        for piece in pieces:
            digest.update(piece)
        assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()
    digest.begin()
    digest.seen(b"earlier")
    digest.update(b"later")
    assert digest.hexdigest() == hashlib.sha256(b"earlierlater").hexdigest()
