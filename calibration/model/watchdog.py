"""End a run of several ranks when one of them fails or no longer answers: collectives alone would wait for it.

Every rank counts upwards in the store through which the ranks met, and looks at the others' counters. A process that
is gone or stopped, or whose host is, stops counting; the others then end with one line and exit code 3. One that fails
in order says so in the store with its exit code: it alone speaks, the others end with the same code.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - documented

from mmquant.errors import InputError

TIMEOUT = 45.0  # seconds without a sign of life
WAIT, WAIT_TIMEOUT = 12 * 3600.0, "MMQUANT_WAIT_TIMEOUT"  # seconds in a collective
MOST = 1e7  # seconds: 115 days
LEFT = 1 << 40  # added by a rank that ends in order
SILENT = "the process through which the ranks met no longer answers"
FAILED, CODE = "mmquant-failed", "mmquant-exit-code"  # how many have failed, and the first one's exit code
EXIT = 3  # PartialError's: the same command continues


def rank_timeout() -> float:
    """Seconds after which a silent rank is given up: MMQUANT_RANK_TIMEOUT, else 45."""
    return _seconds("MMQUANT_RANK_TIMEOUT", TIMEOUT)


def wait_timeout() -> float:
    """Seconds after which a rank gives up waiting for what another does: MMQUANT_WAIT_TIMEOUT, else 12 hours.

    A collective waits while the first rank waits for its network (a shard, an upload): by default NCCL gives up after
    ten minutes, gloo after thirty.
    """
    return _seconds(WAIT_TIMEOUT, WAIT)


def _seconds(variable: str, default: float) -> float:
    """An environment variable's seconds. InputError for what is no such number."""
    text = os.environ.get(variable, "").strip()
    try:
        found = float(text) if text else default
    except ValueError:
        found = 0.0
    if not 0 < found <= MOST:
        raise InputError(f"{variable}={text[:40]}: expected seconds, above 0 and at most {MOST:,.0f}")
    return found


class Watchdog:
    """Counts for this rank and watches the others until `leave`.

    `end` is called with the line that says who is lost, or with None where another rank says it, and the exit code.
    """

    def __init__(self, rank: int, size: int, timeout: float, end: Callable[[str | None, int], None]) -> None:
        self.rank, self.size, self.timeout, self.end = rank, size, timeout, end
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=timeout)
        self._store = TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
        self._left, self._over = threading.Event(), threading.Event()
        self._heard = time.monotonic()
        self._count(rank, 1)
        threading.Thread(target=self._run, daemon=True).start()
        threading.Thread(target=self._oversee, daemon=True).start()

    def fail(self, code: int) -> int | None:
        """This rank ends with an exit code: None where it is the first that fails, else the first one's code."""
        self._left.set()
        self._heard = time.monotonic()
        try:
            first = self._store.add(FAILED, 1) == 1
            if first:
                self._store.set(CODE, str(code))
            return None if first else int(self._store.get(CODE))
        except (RuntimeError, OSError):  # where the ranks met is gone
            return None
        finally:
            self._over.set()

    def leave(self) -> None:
        """This rank is done; the others no longer wait for it."""
        if not self._left.is_set():
            self._left.set()
            self._heard = time.monotonic()
            with suppress(RuntimeError, OSError):  # whoever kept the store is done as well and has left before
                self._count(self.rank, LEFT)
            self._over.set()

    def _count(self, rank: int, step: int) -> int:
        return self._store.add(f"mmquant-alive-{rank}", step)

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        while not self._left.wait(self.timeout / 10):
            try:
                self._count(self.rank, 1)
                if self._store.add(FAILED, 0):
                    self.end(None, int(self._store.get(CODE)))
                    return
                counts = {other: self._count(other, 0) for other in range(self.size) if other != self.rank}
            except (RuntimeError, OSError):  # dist.DistError is a RuntimeError: where the ranks met is gone
                if not self._left.is_set():
                    self.end(SILENT, EXIT)
                return
            now = self._heard = time.monotonic()
            for other, count in counts.items():
                if other not in seen or seen[other][0] != count:
                    seen[other] = count, now
            self._judge(seen, now)

    def _oversee(self) -> None:
        """End this process where the store's own stands still: asking it has no end then."""
        while not self._over.wait(self.timeout / 10):
            if time.monotonic() - self._heard > self.timeout:
                self.end(SILENT, EXIT)

    def _judge(self, seen: dict[int, tuple[int, float]], now: float) -> None:
        silent = [r for r, (count, since) in seen.items() if count < LEFT and now - since > self.timeout]
        if silent:
            speaker = min(r for r in range(self.size) if r not in silent)
            text = f"rank {silent[0]} of {self.size} gave no sign of life for {self.timeout:g} seconds"
            self.end(text if speaker == self.rank else None, EXIT)


def end_process(text: str | None, code: int) -> None:
    """One line on stderr, and the process ends as it stands: its main thread waits for the lost rank."""
    if text is not None:
        more = "run the same command again to continue, on any number of ranks"
        os.write(2, f"\nmmquant: {text}; {more}\n".encode())
        time.sleep(rank_timeout() / 3)  # the others find out by themselves: rank 0 may keep the store
    os._exit(code)
