"""Seconds and bytes of a rank by stage: what it computes, what it moves to others, when it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _path  # noqa: F401
import torch
import torch.distributed as dist

from mmquant.calibration.model.distributed import world

MOVED = ("broadcast", "send", "recv", "batch_isend_irecv", "broadcast_object_list", "all_gather_object", "barrier")


class Clock:
    """Seconds, seconds inside torch.distributed and bytes sent, by stage; the device is waited for on both sides."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.found = device, dict[str, list[float]]()
        self.inside, self.sent, self._depth = 0.0, 0, 0
        for name in MOVED:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str, part: bool = False) -> Iterator[None]:
        """part: of a stage that is running, which adds up and does not wait for other ranks."""
        if not part and world()[1] > 1:
            dist.barrier()
        start, inside, sent = self.now(), self.inside, self.sent
        yield
        taken = [self.now() - start, self.inside - inside, float(self.sent - sent)]
        before = self.found.get(name, [0.0] * 3)
        self.found[name] = [a + b for a, b in zip(before, taken, strict=True)]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: object, **named: object) -> object:
            with self.stage(name, part=True):
                return function(*values, **named)

        return call

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> object:  # noqa: ANN401
            if named.get("async_op"):  # goes on beside other work: only its bytes are counted
                self.sent += sent_bytes(function.__name__, values, named)
                return function(*values, **named)
            start, self._depth = self.now(), self._depth + 1
            found = function(*values, **named)
            if function.__name__ == "batch_isend_irecv":
                for work in found:
                    work.wait()
                found = []
            self._depth -= 1
            if self._depth == 0:  # calls of torch.distributed use each other
                self.inside += self.now() - start
                self.sent += sent_bytes(function.__name__, values, named)
            return found

        return call


def sent_bytes(name: str, values: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Bytes of tensors that this rank has sent by a call; a broadcast counts once for each receiver."""
    if name == "broadcast":
        return values[0].nbytes * (world()[1] - 1) if named["src"] == world()[0] else 0
    if name == "send":
        return values[0].nbytes
    if name == "batch_isend_irecv":
        return sum(move.tensor.nbytes for move in values[0] if move.op is dist.isend)
    return 0
