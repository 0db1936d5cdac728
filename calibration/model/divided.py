"""Divide a layer's pieces of work over the ranks of torchrun; every rank gets every result."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import rank_share, world

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def divided(
    pieces: Sequence[Piece], work: Callable[[Piece], Result], owners: Sequence[int] | None = None
) -> Iterator[tuple[int, Result]]:
    """(number, result) of the `work` of every piece, each done by one rank and sent to the others.

    owners: the rank that does each piece; by default piece i is that of rank i modulo their number. Every rank does
    one piece, then the results go round: one a rank is held at a time, and pieces do not come in their order. Results
    are made of what pickle knows, arrays and tensors; those lie on this rank's device where the owner's did. All ranks
    must take all results.
    """
    rank, size = world()
    whose = owners if owners is not None else [number % size for number in range(len(pieces))]
    queues = [[number for number, owner in enumerate(whose) if owner == one] for one in range(size)]
    for turn in range(max(map(len, queues), default=0)):
        now = [queue[turn] if turn < len(queue) else None for queue in queues]
        own = now[rank]
        mine = None if own is None else work(pieces[own])
        for owner, number in enumerate(now):
            if number is not None:
                yield number, from_owner(partial(cast, Result, mine), owner)
        del mine


def owned_ranges(parts: Sequence[range], step: int) -> tuple[list[range], list[int]]:
    """Each owner's range in pieces of at most `step`, as equal as can be; and their owners."""
    pieces: list[range] = []
    owners: list[int] = []
    for owner, part in enumerate(parts):
        count = -(-len(part) // step)
        for number in range(count):
            share = rank_share(len(part), number, count)
            pieces.append(range(part.start + share.start, part.start + share.stop))
            owners.append(owner)
    return pieces, owners


def from_owner(make: Callable[[], Result], owner: int = 0) -> Result:
    """What `make` returns at the owner, on every rank; the others do not call theirs. All ranks must come together.

    Tensors move as they are, the rest is pickled (between our own processes).
    """
    rank, size = world()
    if size == 1:
        return make()
    value = make() if rank == owner else None
    tensors: list[Tensor] = []
    frame: list[Any] = [None, None]
    if rank == owner:
        frame[0] = _packed(value, tensors)
        frame[1] = [(tuple(t.shape), t.dtype, t.device.type) for t in tensors]
    dist.broadcast_object_list(frame, src=owner)
    if rank != owner:
        tensors = [torch.empty(shape, dtype=dtype, device=kind) for shape, dtype, kind in frame[1]]
    tensors = [_sent(tensor, owner) for tensor in tensors]
    return value if rank == owner else _unpacked(frame[0], tensors)  # type: ignore[return-value]


def _sent(tensor: Tensor, owner: int) -> Tensor:
    """One tensor from its owner; NCCL moves what lies on a card."""
    through = tensor.cuda() if dist.get_backend() == "nccl" and tensor.device.type == "cpu" else tensor.contiguous()
    if through.numel():
        dist.broadcast(through.flatten().view(torch.uint8), src=owner)
    return through.to(tensor.device)


def _packed(value: object, tensors: list[Tensor]) -> bytes:
    class Packer(pickle.Pickler):
        def persistent_id(self, obj: object) -> tuple[int, str] | None:
            if isinstance(obj, Tensor):
                tensors.append(obj.detach())
                return len(tensors) - 1, "tensor"
            if isinstance(obj, np.ndarray):
                tensors.append(torch.from_numpy(np.ascontiguousarray(obj)))
                return len(tensors) - 1, "array"
            return None

    out = io.BytesIO()
    Packer(out).dump(value)
    return out.getvalue()


def _unpacked(data: bytes, tensors: list[Tensor]) -> Any:  # noqa: ANN401 - whatever was packed
    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: tuple[int, str]) -> Tensor | np.ndarray:
            number, kind = pid
            return tensors[number] if kind == "tensor" else tensors[number].numpy()

    return Unpacker(io.BytesIO(data)).load()
