"""Split a pass over several processes (torchrun): windows and bytes by rank, sums in rank order.

Without torchrun everything here is a no-op for one process. Backends: NCCL on CUDA, gloo on CPU. Sums never go through
all-reduce: they are sent to their owner and added in the order of the ranks, so that equal runs give equal bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mmquant.errors import InputError, PartialError

from .watchdog import WAIT_TIMEOUT, Watchdog, end_process, rank_timeout, wait_timeout

T = TypeVar("T")

EXCHANGED = 1 << 29  # bytes that a rank sends, and as many that it receives, at a time

_WATCHDOGS: list[Watchdog] = []  # this process's, while it is in a group


def world() -> tuple[int, int]:
    """(rank, size); (0, 1) outside torchrun. Joins the process group at the first call."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        longest, patience = timedelta(seconds=wait_timeout()), rank_timeout()  # who is gone is the watchdog's to tell
        store, rank, size = next(rendezvous("env://"))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)
        store.set_timeout(longest)  # NCCL meets there anew for each communicator; a store that is given keeps its own
        _WATCHDOGS.append(Watchdog(dist.get_rank(), size, patience, end_process))
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the process group, if there is one."""
    while _WATCHDOGS:
        _WATCHDOGS.pop().leave()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_joined() -> bool:
    """Whether this process has joined other ranks, and not left them."""
    return bool(_WATCHDOGS)


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")
LATE = ("Timed out waiting", "wait timeout after", "collective operation timeout")  # of gloo, of the store, of NCCL


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: what happened there is to be said, not this."""
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
    return bool(_WATCHDOGS) and (told or type(error).__name__.startswith("Dist"))


def waited_long(error: BaseException) -> PartialError | None:
    """What to say where a collective gave up: another rank hangs, however alive its process is, or is slow."""
    if not _WATCHDOGS or not isinstance(error, RuntimeError) or not any(word in str(error) for word in LATE):
        return None
    rank, size = dist.get_rank(), dist.get_world_size()
    waited = f"rank {rank} of {size} waited {wait_timeout():g} seconds for another one"
    return PartialError(f"{waited}, which hangs or needs more ({WAIT_TIMEOUT}); run the same command again to continue")


def await_end() -> None:
    """Wait for the watchdog to end this process: it hears within a tenth of its timeout of a rank that failed."""
    time.sleep(2 * rank_timeout())


def fail(code: int) -> int | None:
    """This rank ends with an exit code: None where it is the first and speaks, else the first one's code."""
    known = _WATCHDOGS[0].fail(code) if _WATCHDOGS else None
    if known is None and _WATCHDOGS and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        time.sleep(rank_timeout() / 5)  # the first rank may keep the store in which the others find it
    return known


def rank_device(device: torch.device | str) -> torch.device:
    """The device of this rank: `cuda` becomes cuda:LOCAL_RANK."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return chosen


def rank_share(count: int, rank: int, size: int) -> range:
    """This rank's contiguous part of `count` things; parts differ by one at most and cover everything once."""
    return range(count * rank // size, count * (rank + 1) // size)


def check_alone(what: str) -> None:
    """InputError under torchrun for what one process does."""
    if world()[1] > 1:
        raise InputError(f"{what} is measured in one process, expected no torchrun; other commands take its plan")


def rank_shares(count: int) -> list[range]:
    """Every rank's part of `count` things."""
    size = world()[1]
    return [rank_share(count, rank, size) for rank in range(size)]


def rank_of(item: int, count: int) -> int:
    """The rank that has an item of `rank_share`."""
    return next(rank for rank, share in enumerate(rank_shares(count)) if item in share)


def broadcast(tensor: Tensor, owner: int) -> None:
    """The owner's values, in place on every rank; any dtype, contiguous."""
    if tensor.numel():
        moved = movable(tensor)
        dist.broadcast(moved.view(-1).view(torch.uint8), src=owner)
        if moved is not tensor:
            tensor.copy_(moved)


def broadcast_later(tensor: Tensor, owner: int) -> Callable[[], object]:
    """`broadcast` that is begun, where NCCL goes on by itself; to be called for its end."""
    if tensor.is_cuda and tensor.numel():
        work = dist.broadcast(tensor.view(-1).view(torch.uint8), src=owner, async_op=True)
        assert work is not None
        return work.wait
    broadcast(tensor, owner)
    return lambda: None


def movable(tensor: Tensor) -> Tensor:
    """The tensor itself, or its copy on this rank's card: NCCL moves only what lies there."""
    return tensor.cuda() if tensor.device.type == "cpu" and dist.get_backend() == "nccl" else tensor


def _fold(tensor: Tensor, owner: int, combine: Callable[..., Tensor]) -> Tensor:
    rank, size = world()
    if size == 1 or not tensor.numel():
        return tensor
    moved = movable(tensor.contiguous())
    if rank != owner:
        dist.send(moved, dst=owner)
        return tensor
    total, other = None, torch.empty_like(moved)
    for source in range(size):
        if source != owner:
            dist.recv(other, src=source)
        value = moved if source == owner else other
        total = value.clone() if total is None else combine(total, value, out=total)
    assert total is not None
    return total.to(tensor.device)


def sum_to_owners(tensor: Tensor) -> None:
    """In place: the sum over ranks [E, ...] of the matrices that are this rank's (`rank_share`), added in rank order.

    The others' keep this rank's own sums. All pairs of ranks exchange at once, a few matrices at a time.
    """
    rank, size = world()
    if size == 1 or not tensor.numel():
        return
    shares = rank_shares(len(tensor))
    step = max(1, EXCHANGED // (tensor[0].nbytes * size))
    for first in range(0, max(map(len, shares)), step):
        parts = [tensor[s.start + first : min(s.stop, s.start + first + step)].contiguous() for s in shares]
        parts = [movable(part) for part in parts]
        mine = parts[rank]
        others = [i for i in range(size) if i != rank]
        found = {i: torch.empty_like(mine) for i in others}
        moves = [dist.P2POp(dist.isend, parts[i], i) for i in others if parts[i].numel()]
        moves += [dist.P2POp(dist.irecv, found[i], i) for i in others if mine.numel()]
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        if mine.numel():
            found[rank] = mine
            total = found[0].clone()
            for source in range(1, size):
                total += found[source]
            tensor[shares[rank].start + first : shares[rank].start + first + len(mine)] = total


def sum_everywhere(tensor: Tensor) -> Tensor:
    """The sum over ranks, added in rank order, on every rank."""
    return _everywhere(tensor, torch.add)


def max_everywhere(tensor: Tensor) -> Tensor:
    """The largest over ranks, element by element, on every rank."""
    return _everywhere(tensor, torch.maximum)


def _everywhere(tensor: Tensor, combine: Callable[..., Tensor]) -> Tensor:
    rank, size = world()
    if size == 1:
        return tensor
    total = _fold(tensor, 0, combine).contiguous()
    total = total if rank == 0 else torch.empty_like(total)
    broadcast(total, 0)
    return total


def all_have(condition: bool) -> bool:
    """Whether a condition holds on every rank."""
    return all(current_ranks().gather(condition))


def barrier() -> None:
    """Wait for all ranks."""
    if world()[1] > 1:
        dist.barrier()


@dataclass(frozen=True)
class Ranks:
    """This process's part of an evaluation: its number and how many there are."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things, contiguous, sizes differing by one at most."""
        return rank_share(count, self.rank, self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank. All ranks must call it together."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def current_ranks() -> Ranks:
    """The ranks that torchrun started, or one rank alone."""
    return Ranks(*world())
